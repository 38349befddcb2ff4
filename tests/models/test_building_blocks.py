"""Parts that several networks share."""

import torch

from models.building_blocks import SqueezeExcitation


def test_a_gate_scales_channels_by_what_the_whole_image_says():
    gate, images = SqueezeExcitation(32), torch.randn(2, 32, 4, 4)
    scale = gate(images) / images
    assert ((scale > 0) & (scale < 1)).all()
    torch.testing.assert_close(scale, scale[..., :1, :1].expand_as(scale))
    shuffled = images.flatten(2)[..., torch.randperm(16)].reshape(images.shape)
    torch.testing.assert_close(gate(shuffled) / shuffled, scale)
