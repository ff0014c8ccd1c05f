"""Image models of timm, from small constructor arguments and with random weights."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn

from .registry import Call, Case, call, quick
from .torchvision_standin import import_timm


def make(architecture: str, **options: Any) -> nn.Module:
    """Return a model of timm by its name, with five classes and random weights."""
    model: nn.Module = import_timm().create_model(architecture, num_classes=5, **options)
    return model


def pictures(batch: int, size: int) -> Call:
    """Return a batch of square RGB images."""
    return call(torch.randn(batch, 3, size, size))


def timm(name: str, architecture: str, size: int = 64, **options: Any) -> Case:
    """Return the case of one architecture of timm."""
    model = functools.partial(make, architecture, **options)
    return Case(f"timm-{name}", model, functools.partial(pictures, size=size))


def make_class(path: str, **options: Any) -> nn.Module:
    """Return a model from its class, where the named architectures fix all sizes.

    An option ``…_layer`` names a class of the same module.
    """
    import_timm()
    home, name = path.split(".")
    module = importlib.import_module(f"timm.models.{home}")
    for option, value in options.items():
        if option.endswith("_layer"):
            options[option] = getattr(module, value)
    model: nn.Module = getattr(module, name)(num_classes=5, **options)
    return model


def timm_class(name: str, path: str, size: int = 64, **options: Any) -> Case:
    """Return the case of one class of timm."""
    model = functools.partial(make_class, path, **options)
    return Case(f"timm-{name}", model, functools.partial(pictures, size=size))


_MIXER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32}
_VIT: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4,
}  # fmt: skip
_SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2),
    "num_heads": (2, 4),
}  # fmt: skip
_DROP: dict[str, Any] = {"drop_path_rate": 0.2, "drop_rate": 0.1}

CASES = (
    quick(timm("resnet", "resnet10t")),
    timm("resnet-antialiased", "resnetblur18"),
    timm("resnetv2", "resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 16, 32, 32)),
    timm("densenet", "densenet121", growth_rate=8, block_config=(2, 2, 2)),
    timm("inception-next", "inception_next_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    quick(timm("efficientnet", "efficientnet_b0", drop_path_rate=0.2)),
    timm("efficientnet-lite", "efficientnet_lite0"),
    timm("mobilenetv3", "mobilenetv3_small_050"),
    timm("mobilenetv2", "mobilenetv2_035"),
    timm("ghostnet", "ghostnet_050"),
    timm("mixnet", "mixnet_s"),
    timm("convnext", "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), **_DROP),
    timm("convnextv2", "convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    timm("swin", "swin_tiny_patch4_window7_224", size=32, **_SWIN),
    timm("swinv2", "swinv2_tiny_window8_256", size=32, **_SWIN),
    quick(timm("vit", "vit_tiny_patch16_224", size=32, **_VIT)),
    timm("vit-layerscale", "vit_tiny_patch16_224", size=32, init_values=1e-5, **_VIT, **_DROP),
    timm("vit-siglip", "vit_base_patch16_siglip_224", size=32, **_VIT),
    timm("deit3", "deit3_small_patch16_224", size=32, **_VIT),
    timm("beit", "beit_base_patch16_224", size=32, **_VIT),
    timm("eva", "eva02_tiny_patch14_224", size=32, **_VIT),
    timm("cait", "cait_xxs24_224", size=32, **_VIT),
    timm("xcit", "xcit_nano_12_p8_224", size=32, depth=2, embed_dim=32, img_size=32),
    timm("nfnet", "nfnet_f0", depths=(1, 1, 1, 1), channels=(64, 64, 128, 128),
         group_size=32, stem_type="3x3"),
    timm_class("mlp-mixer", "mlp_mixer.MlpMixer", 32, **_MIXER),
    timm_class("gmlp", "mlp_mixer.MlpMixer", 32, block_layer="SpatialGatingBlock", mlp_ratio=4,
               mlp_layer="GatedMlp", **_MIXER),
    timm("mobilevit", "mobilevit_xxs"),
    timm("mobilevitv2", "mobilevitv2_050"),
    timm("regnet", "regnety_002"),
    timm_class("volo", "volo.VOLO", layers=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), img_size=64,
               embed_dims=(16, 32, 32, 32), outlook_attention=(True, False, False, False)),
    timm("edgenext", "edgenext_xx_small"),
    timm_class("poolformer", "metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    timm("levit", "levit_128s", img_size=64),
    timm("pit", "pit_ti_224", size=64, img_size=64),
    timm("coat", "coat_lite_tiny", size=64, img_size=64),
    timm("fastvit", "fastvit_t8"),
    timm("repvgg", "repvgg_a0"),
    timm("hiera", "hiera_tiny_224", size=64, img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1)),
    timm("visformer", "visformer_tiny", size=64, img_size=64),
    timm("mambaout", "mambaout_femto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
)  # fmt: skip
