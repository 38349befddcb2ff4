"""Model in, model out: plan, convert, fuse and recalibrate whole models.

| file | content |
|---|---|
| plan.py | the treatment of each layer, as rows with reasons |
| convert.py | the copy that a plan describes |
| batchnorm.py | classes of BatchNorm, and their affine map in evaluation |
| tracing.py | which module's output enters which |
| fuse.py | deconvolutions folded into plain layers |
| recalibrate.py | running statistics averaged anew |
"""
