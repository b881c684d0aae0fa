"""Run by ComfyUI's Python: decoding as a stream against decoding at once.

    python decode_stream_check.py COMFYUI CHECKOUT PACK

Prints JSON: {codec: {chunking: largest difference, ...}, ...} and for each codec the `range` of its pixels.
"""

import json
import sys

comfyui, checkout, pack = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, comfyui)

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from pack import load_pack  # noqa: E402

CHUNKINGS = [[10], [1] * 10, [3, 3, 3, 1], [1, 2, 2, 2, 2, 1], [2, 1, 4, 3], [1, 3, 3, 3]]


def small_wan_vae() -> comfy.sd.VAE:
    net = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.ones_like(value)
        if key.endswith("gamma")
        else torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5 * 0.7
        for key, value in net.state_dict().items()
    }
    return comfy.sd.VAE(sd=state)


@torch.inference_mode()
def main() -> None:
    part = load_pack(checkout, pack)
    part("nodes")
    decode_stream = part("nodes.video").decode_stream
    codec = part("model.codecs.demo_vae")
    demo = part("nodes.demo").DemoVAE(part("model.checkpoints.student").load_demo_codec())
    latents = torch.randn((1, 16, 10, 4, 6), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, vae in (("demo", demo), ("wan", small_wan_vae())):
        whole = vae.decode(codec.denormalise(latents))
        found[name] = {"range": (whole.amax() - whole.amin()).item()}
        for sizes in CHUNKINGS:
            pixels = torch.cat(list(decode_stream(vae, latents.split(sizes, dim=2))), dim=2)
            as_images = pixels.add(1).div(2).clamp(0, 1).movedim(1, -1)
            assert as_images.shape == whole.shape == (1, 37, 32, 48, 3), (as_images.shape, whole.shape)
            found[name][str(sizes)] = (as_images - whole).abs().amax().item()
        assert vae.encode(whole[0]).shape == latents.shape
        tiled = vae.decode_tiled(latents, tile_x=4, tile_y=4, overlap=1)
        assert tiled.shape == whole.shape and 0 <= tiled.amin() and tiled.amax() <= 1
    print(json.dumps(found))


main()
