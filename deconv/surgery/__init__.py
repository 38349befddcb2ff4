"""Plan, convert, calibrate, fuse and recalibrate whole models.

| file | content |
|---|---|
| plan.py | the treatment of each layer, as rows with reasons |
| convert.py | the copy that a plan describes |
| batchnorm.py | classes of BatchNorm, and their affine map in evaluation |
| tracing.py | dataflow between modules, from symbolic traces |
| calibrate.py | weights rewritten so that training starts at the evaluation outputs |
| fuse.py | deconvolutions folded into plain layers |
| recalibrate.py | running statistics averaged anew |
"""
