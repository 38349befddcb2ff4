"""Network deconvolution: convolutions that whiten what their kernel sees (Ye et al., ICLR 2020).

    from deconv import Delinear, FastDeconv, FastDeconvTranspose2d
    from deconv import convert, fuse, plan, recalibrate, whiteness

    conv = FastDeconv(64, 128, 3, padding=1)    # in place of Conv2d + BatchNorm2d
    head = Delinear(512, 10)                    # in place of Linear
    up = FastDeconvTranspose2d(128, 64, 4, stride=2, padding=1)    # 1d, 3d: the same names
    network = convert(resnet18())               # in place of all of them, in any network
    print(plan(resnet18()))                     # what that does to each layer, and why
    recalibrate(network, loader)                # running statistics anew, of averaged weights, say
    print(whiteness(network, images))           # before and after whitening, layer by layer
    served = fuse(network.eval())               # trained: plain Conv2d and Linear layers

A convolution sees patches x_p, and neighbouring pixels and channels of a patch are strongly
correlated. The correlation acts like a blur that gradient descent must undo. Whitening removes it:

    mu  = mean_p x_p
    Cov = mean_p (x_p - mu)(x_p - mu)^T + eps I
    D   ~ Cov^(-1/2)                                     coupled Newton-Schulz, five steps
    y   = W D (x - mu) + b = (W D) x + (b - W D mu)      so fold D and mu into W and b

Nothing the size of a feature map is whitened: an ordinary convolution runs with the folded weight.
In evaluation mu and Cov are running averages, and the layer is a plain convolution exactly.
Under torch.distributed mu and Cov are those of the patches of all processes (`sync_stats`).

| symbol | shape or unit | meaning | where |
|---|---|---|---|
| N C H W | | a batch of feature maps | |
| T | K * K | taps of the kernel | |
| B | channels | `block`: channels whitened together | `divide_channels` |
| F | B * T | features of a block | `Blocks.features` |
| M | | sampled patches, every `sampling_stride`-th or fewer | `PatchGrid`, `PatchSubset` |
| S | | blocks that share one D | `Blocks.sharing` |
| G | | whitening matrices of the layer | `Blocks.matrices` |
| mu | (C*T,) | mean patch | `measure_patches` |
| Cov | (G, F, F) | covariance, eps on its diagonal (units of variance) | `measure_patches` |
| D | (G, F, F) | its inverse square root | `inverse_sqrt` |
| W D | as weight | effective kernel | `fold`, `fuse` |

The package imports nothing but torch and can be copied into another project unchanged.
"""

from .conv import FastDeconv, FastDeconv1d, FastDeconv2d, FastDeconv3d
from .conv_transpose import FastDeconvTranspose1d, FastDeconvTranspose2d, FastDeconvTranspose3d
from .linear import Delinear
from .surgery.convert import convert
from .surgery.fuse import fuse
from .surgery.plan import plan
from .surgery.recalibrate import recalibrate
from .sync import batch_share
from .whiteness import whiteness

__all__ = [
    "Delinear",
    "FastDeconv",
    "FastDeconv1d",
    "FastDeconv2d",
    "FastDeconv3d",
    "FastDeconvTranspose1d",
    "FastDeconvTranspose2d",
    "FastDeconvTranspose3d",
    "batch_share",
    "convert",
    "fuse",
    "plan",
    "recalibrate",
    "whiteness",
]
__version__ = "0.1.0"
