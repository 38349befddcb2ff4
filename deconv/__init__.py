"""Network deconvolution: layers that whiten what their kernel sees (Ye et al., ICLR 2020).

    from deconv import Delinear, FastDeconv, FastDeconvTranspose2d
    from deconv import convert, fuse, plan, recalibrate, whiteness

    conv = FastDeconv(64, 128, 3, padding=1)    # replaces Conv2d and BatchNorm2d
    head = Delinear(512, 10)                    # replaces Linear
    up = FastDeconvTranspose2d(128, 64, 4, stride=2, padding=1)    # also 1d and 3d
    model = convert(resnet18())                 # replaces these layers in any model
    print(plan(resnet18()))                     # lists what `convert` does to each layer
    convert(trained, pretrained=True, calibrate=loader)    # keeps the outputs of a trained model
    recalibrate(model, loader)                  # computes the running statistics anew
    print(whiteness(model, images))             # correlation before and after whitening, by layer
    served = fuse(model.eval())                 # a trained model as plain Conv2d and Linear layers
    conv = FastDeconv(3, 64, 3, **PUBLISHED)    # with the numerics of the published code

A convolution sees patches x_p. Neighbouring pixels and channels of a patch are strongly correlated.
This correlation acts like a blur that gradient descent must undo. Whitening removes it, in four
steps (Algorithm 1 of the paper):

    x_p = sample(x)                                       patches                ops/patches.py
    mu  = mean_p x_p                                      mean                   ops/covariance.py
    Cov = mean_p (x_p - mu)(x_p - mu)^T                   covariance             ops/covariance.py
    D   ~ (Cov + eps I)^(-1/2)                            inverse square root    ops/inverse_sqrt.py
    y   = W D (x - mu) + b = (W D) x + (b - W D mu)       fold D, mu into W, b   ops/fold.py

No feature map is whitened: one ordinary convolution runs with the folded weight and bias. In
evaluation mu and Cov are running averages, and the layer equals a plain convolution. Inside
DistributedDataParallel, or with a `process_group`, mu and Cov are over the patches of all ranks.
`Whitening.fold_whitening` in whitening.py runs the four steps for every kind of layer.

| symbol | shape or unit | meaning | name in the code |
|---|---|---|---|
| N C H W | | batch of images or feature maps | `x` |
| T | K * K | taps of the kernel | `Blocks.taps` |
| B | channels | channels whitened together | `block`, `Blocks.size` |
| F | B * T | features of a block | `Blocks.features` |
| M | | sampled patches | `PatchGrid`, `PatchSubset` |
| S | | blocks that share one D | `Blocks.sharing` |
| G | | whitening matrices of the layer | `Blocks.matrices` |
| mu | (C*T,) | mean patch | `mean_and_covariance` |
| Cov | (G, F, F), units of variance | covariance of a block's features | `mean_and_covariance` |
| D | (G, F, F) | inverse square root of Cov + eps I | `inverse_sqrt` |
| W D | as weight | folded weight | `fold`, `fuse` |

The package imports nothing but torch. It can be copied into another project.
"""

from .conv import FastDeconv, FastDeconv1d, FastDeconv2d, FastDeconv3d
from .conv_transpose import FastDeconvTranspose1d, FastDeconvTranspose2d, FastDeconvTranspose3d
from .linear import Delinear
from .published import PUBLISHED
from .running import group_statistics
from .surgery.calibrate import calibrate
from .surgery.convert import convert
from .surgery.fuse import fuse
from .surgery.plan import plan
from .surgery.recalibrate import recalibrate
from .sync import batch_share
from .whiteness import whiteness

__all__ = [
    "PUBLISHED",
    "Delinear",
    "FastDeconv",
    "FastDeconv1d",
    "FastDeconv2d",
    "FastDeconv3d",
    "FastDeconvTranspose1d",
    "FastDeconvTranspose2d",
    "FastDeconvTranspose3d",
    "batch_share",
    "calibrate",
    "convert",
    "fuse",
    "group_statistics",
    "plan",
    "recalibrate",
    "whiteness",
]
__version__ = "0.1.0"
