"""One tiny random model per family and variant, of the stock classes, with every part and setting that the large ones have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign.shapes import build

CLIP_WIDTH = 16
T5_WIDTH = 32  # both CLIPs side by side are padded to it


def vae(blocks: int = 3, side: int = 32, **config: Any) -> Any:
    """Down by 2^(blocks - 1) to 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=side,
        mid_block_add_attention=False,
        **({"scaling_factor": 0.7} | config),
    )


def clip(vocab: int, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=CLIP_WIDTH,
        intermediate_size=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=build.MAX_TOKENS,
        projection_dim=CLIP_WIDTH,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5() -> tuple[Any, Any]:
    """(encoder, tokenizer over single letters); whatever is no letter is unknown."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    letters += [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz,.0123456789"]
    shape = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512)
    return T5EncoderModel(T5Config(vocab_size=len(letters), **shape)), tokenizer


def clips(folder: Path, second_pad: str | None = None) -> dict[str, Any]:
    """Two CLIP text encoders, the second with a projection and, as SDXL's, another token to fill up with."""
    one, two = build.tokenizer(folder / "made-from"), build.tokenizer(folder / "made-from")
    if second_pad:
        two.pad_token = second_pad
    return {
        "text_encoder": clip(len(one)),
        "tokenizer": one,
        "text_encoder_2": clip(len(two), projected=True),
        "tokenizer_2": two,
    }


def sd(folder: Path) -> Any:
    tok = build.tokenizer(folder / "made-from")
    unet = build.unet((32,), text_dim=32)
    return build.pipeline(unet, build.vae((8, 8, 8)), build.text_encoder(len(tok), hidden=32, layers=1), tok)


def sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=2 * CLIP_WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,  # one channel a group would normalise time and size away
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
    )
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return StableDiffusionXLPipeline(vae=vae(), unet=unet, scheduler=scheduler, **clips(folder, "!"))


def sd3(folder: Path, with_t5: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
    )
    texts = clips(folder) | {"text_encoder": clip(len(build.tokenizer(folder / "made-from")), projected=True)}
    encoder, tokenizer = t5() if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
        **texts,
    )


def flux(folder: Path, dev: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=dev,
        axes_dims_rope=(4, 4, 8),
    )
    tok = build.tokenizer(folder / "made-from")
    encoder, tokenizer = t5()
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    return FluxPipeline(
        vae=vae(shift_factor=0.11, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        text_encoder=clip(len(tok)),
        tokenizer=tok,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
    )


def pixart(folder: Path, sigma: bool = False) -> Any:
    """alpha has 128 latents a side, for which alone the stock pipeline tells the picture's size."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8 if sigma else 128,
        patch_size=2 if sigma else 16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        cross_attention_dim=24,
        caption_channels=T5_WIDTH,
        use_additional_conditions=not sigma,
    )
    encoder, tokenizer = t5()
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        vae=vae() if sigma else vae(blocks=1, side=128),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3-without-t5": lambda folder: sd3(folder, with_t5=False),
    "flux-dev": flux,
    "flux-schnell": lambda folder: flux(folder, dev=False),
    "pixart-alpha": pixart,
    "pixart-sigma": lambda folder: pixart(folder, sigma=True),
}


def randomise(pipeline: Any, seed: int = 0) -> None:
    """Some layers begin at zero (norms, output projections), which would hide what goes wrong before them."""
    g = torch.Generator().manual_seed(seed)
    for name in ("unet", "transformer"):
        for p in getattr(pipeline, name).parameters() if getattr(pipeline, name, None) is not None else ():
            with torch.no_grad():
                p.add_(0.1 * torch.randn(p.shape, generator=g))
