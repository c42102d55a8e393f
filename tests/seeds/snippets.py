"""The snippets of the documents that our user gave us, as they stand there.

A row is (place: document and line, title, why it is not run yet or "" if it is, code). Where a document has lost the
indentation of its code, the snippet has it again; nothing else differs. Excerpts of source code are listed
without their text.
"""

# ruff: noqa: E501, W291
from __future__ import annotations

from typing import NamedTuple


class Snippet(NamedTuple):
    place: str
    title: str
    not_yet: str
    code: str


SNIPPETS = [
    Snippet(
        "000:37",
        "Shard a checkpoint",
        "",
        """
from diffusers import AutoModel

unet = AutoModel.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", subfolder="unet"
)
unet.save_pretrained("sdxl-unet-sharded", max_shard_size="5GB")
""",
    ),
    Snippet(
        "000:48",
        "Load a sharded checkpoint",
        "",
        """
import torch
from diffusers import AutoModel, StableDiffusionXLPipeline

unet = AutoModel.from_pretrained(
    "username/sdxl-unet-sharded", torch_dtype=torch.float16
)
pipeline = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    unet=unet,
    torch_dtype=torch.float16
).to("cuda")
""",
    ),
    Snippet(
        "000:74",
        "Balance a pipeline over devices",
        "",
        """
import torch
from diffusers import AutoModel, StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    torch_dtype=torch.float16,
    device_map="balanced"
)
""",
    ),
    Snippet(
        "000:87",
        "Look at a pipeline's device map",
        "",
        """
print(pipeline.hf_device_map)
{'unet': 1, 'vae': 1, 'safety_checker': 0, 'text_encoder': 0}
""",
    ),
    Snippet(
        "000:97",
        "Spread a transformer over devices",
        "",
        """
import torch
from diffusers import AutoModel

transformer = AutoModel.from_pretrained(
    "black-forest-labs/FLUX.1-dev", 
    subfolder="transformer",
    device_map="auto",
    torch_dtype=torch.bfloat16
)
""",
    ),
    Snippet(
        "000:111",
        "Look at a model's device map",
        "",
        """
print(transformer.hf_device_map)
""",
    ),
    Snippet(
        "000:122",
        "A model's device map, printed",
        "",
        """
print(transformer.hf_device_map)
{'pos_embed': 0, 'time_text_embed': 0, 'context_embedder': 0, 'x_embedder': 0, 'transformer_blocks': 0, 'single_transformer_blocks.0': 0, 'single_transformer_blocks.1': 0, 'single_transformer_blocks.2': 0, 'single_transformer_blocks.3': 0, 'single_transformer_blocks.4': 0, 'single_transformer_blocks.5': 0, 'single_transformer_blocks.6': 0, 'single_transformer_blocks.7': 0, 'single_transformer_blocks.8': 0, 'single_transformer_blocks.9': 0, 'single_transformer_blocks.10': 'cpu', 'single_transformer_blocks.11': 'cpu', 'single_transformer_blocks.12': 'cpu', 'single_transformer_blocks.13': 'cpu', 'single_transformer_blocks.14': 'cpu', 'single_transformer_blocks.15': 'cpu', 'single_transformer_blocks.16': 'cpu', 'single_transformer_blocks.17': 'cpu', 'single_transformer_blocks.18': 'cpu', 'single_transformer_blocks.19': 'cpu', 'single_transformer_blocks.20': 'cpu', 'single_transformer_blocks.21': 'cpu', 'single_transformer_blocks.22': 'cpu', 'single_transformer_blocks.23': 'cpu', 'single_transformer_blocks.24': 'cpu', 'single_transformer_blocks.25': 'cpu', 'single_transformer_blocks.26': 'cpu', 'single_transformer_blocks.27': 'cpu', 'single_transformer_blocks.28': 'cpu', 'single_transformer_blocks.29': 'cpu', 'single_transformer_blocks.30': 'cpu', 'single_transformer_blocks.31': 'cpu', 'single_transformer_blocks.32': 'cpu', 'single_transformer_blocks.33': 'cpu', 'single_transformer_blocks.34': 'cpu', 'single_transformer_blocks.35': 'cpu', 'single_transformer_blocks.36': 'cpu', 'single_transformer_blocks.37': 'cpu', 'norm_out': 'cpu', 'proj_out': 'cpu'}
""",
    ),
    Snippet(
        "000:129",
        "A device map of one's own",
        "",
        """
import torch
from diffusers import AutoModel

device_map = {
    'pos_embed': 0, 'time_text_embed': 0, 'context_embedder': 0, 'x_embedder': 0, 'transformer_blocks': 0, 'single_transformer_blocks.0': 0, 'single_transformer_blocks.1': 0, 'single_transformer_blocks.2': 0, 'single_transformer_blocks.3': 0, 'single_transformer_blocks.4': 0, 'single_transformer_blocks.5': 0, 'single_transformer_blocks.6': 0, 'single_transformer_blocks.7': 0, 'single_transformer_blocks.8': 0, 'single_transformer_blocks.9': 0, 'single_transformer_blocks.10': 1, 'single_transformer_blocks.11': 1, 'single_transformer_blocks.12': 1, 'single_transformer_blocks.13': 1, 'single_transformer_blocks.14': 1, 'single_transformer_blocks.15': 1, 'single_transformer_blocks.16': 1, 'single_transformer_blocks.17': 1, 'single_transformer_blocks.18': 1, 'single_transformer_blocks.19': 1, 'single_transformer_blocks.20': 1, 'single_transformer_blocks.21': 'cpu', 'single_transformer_blocks.22': 'cpu', 'single_transformer_blocks.23': 'cpu', 'single_transformer_blocks.24': 'cpu', 'single_transformer_blocks.25': 'cpu', 'single_transformer_blocks.26': 'cpu', 'single_transformer_blocks.27': 'cpu', 'single_transformer_blocks.28': 'cpu', 'single_transformer_blocks.29': 'cpu', 'single_transformer_blocks.30': 'cpu', 'single_transformer_blocks.31': 'cpu', 'single_transformer_blocks.32': 'cpu', 'single_transformer_blocks.33': 'cpu', 'single_transformer_blocks.34': 'cpu', 'single_transformer_blocks.35': 'cpu', 'single_transformer_blocks.36': 'cpu', 'single_transformer_blocks.37': 'cpu', 'norm_out': 'cpu', 'proj_out': 'cpu'
}

transformer = AutoModel.from_pretrained(
    "black-forest-labs/FLUX.1-dev", 
    subfolder="transformer",
    device_map=device_map,
    torch_dtype=torch.bfloat16
)
""",
    ),
    Snippet(
        "000:147",
        "Limit the memory of each device",
        "",
        """
import torch
from diffusers import AutoModel, StableDiffusionXLPipeline

max_memory = {0:"1GB", 1:"1GB"}
pipeline = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    torch_dtype=torch.float16,
    device_map="balanced",
    max_memory=max_memory
)
""",
    ),
    Snippet(
        "000:167",
        "Reset the device map",
        "",
        """
pipeline.reset_device_map()
""",
    ),
    Snippet(
        "000:179",
        "VAE slicing",
        "",
        """
import torch
from diffusers import AutoModel, StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    torch_dtype=torch.float16,
).to("cuda")
pipeline.enable_vae_slicing()
pipeline(["An astronaut riding a horse on Mars"]*32).images[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
""",
    ),
    Snippet(
        "000:201",
        "VAE tiling",
        "",
        """
import torch
from diffusers import AutoPipelineForImage2Image
from diffusers.utils import load_image

pipeline = AutoPipelineForImage2Image.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16
).to("cuda")
pipeline.enable_vae_tiling()

init_image = load_image("https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers/img2img-sdxl-init.png")
prompt = "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k"
pipeline(prompt, image=init_image, strength=0.5).images[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
""",
    ),
    Snippet(
        "000:237",
        "Sequential offloading",
        "",
        """
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-schnell", torch_dtype=torch.bfloat16
)
pipeline.enable_sequential_cpu_offload()

pipeline(
    prompt="An astronaut riding a horse on Mars",
    guidance_scale=0.,
    height=768,
    width=1360,
    num_inference_steps=4,
    max_sequence_length=256,
).images[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
""",
    ),
    Snippet(
        "000:266",
        "Model offloading",
        "",
        """
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-schnell", torch_dtype=torch.bfloat16
)
pipeline.enable_model_cpu_offload()

pipeline(
    prompt="An astronaut riding a horse on Mars",
    guidance_scale=0.,
    height=768,
    width=1360,
    num_inference_steps=4,
    max_sequence_length=256,
).images[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
""",
    ),
    Snippet(
        "000:307",
        "Group offloading of a pipeline",
        "",
        """
import torch
from diffusers import CogVideoXPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.utils import export_to_video

onload_device = torch.device("cuda")
offload_device = torch.device("cpu")

pipeline = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", torch_dtype=torch.bfloat16)
pipeline.enable_group_offload(
    onload_device=onload_device,
    offload_device=offload_device,
    offload_type="leaf_level",
    use_stream=True
)

prompt = (
    "A panda, dressed in a small, red jacket and a tiny hat, sits on a wooden stool in a serene bamboo forest. "
    "The panda's fluffy paws strum a miniature acoustic guitar, producing soft, melodic tunes. Nearby, a few other "
    "pandas gather, watching curiously and some clapping in rhythm. Sunlight filters through the tall bamboo, "
    "casting a gentle glow on the scene. The panda's face is expressive, showing concentration and joy as it plays. "
    "The background includes a small, flowing stream and vibrant green foliage, enhancing the peaceful and magical "
    "atmosphere of this unique musical performance."
)
video = pipeline(prompt=prompt, guidance_scale=6, num_inference_steps=50).frames[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
export_to_video(video, "output.mp4", fps=8)
""",
    ),
    Snippet(
        "000:342",
        "Group offloading of models",
        "",
        """
import torch
from diffusers import CogVideoXPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.utils import export_to_video

onload_device = torch.device("cuda")
offload_device = torch.device("cpu")
pipeline = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", torch_dtype=torch.bfloat16)

# Use the enable_group_offload method for Diffusers model implementations
pipeline.transformer.enable_group_offload(onload_device=onload_device, offload_device=offload_device, offload_type="leaf_level")
pipeline.vae.enable_group_offload(onload_device=onload_device, offload_type="leaf_level")

# Use the apply_group_offloading method for other model components
apply_group_offloading(pipeline.text_encoder, onload_device=onload_device, offload_type="block_level", num_blocks_per_group=2)

prompt = (
    "A panda, dressed in a small, red jacket and a tiny hat, sits on a wooden stool in a serene bamboo forest. "
    "The panda's fluffy paws strum a miniature acoustic guitar, producing soft, melodic tunes. Nearby, a few other "
    "pandas gather, watching curiously and some clapping in rhythm. Sunlight filters through the tall bamboo, "
    "casting a gentle glow on the scene. The panda's face is expressive, showing concentration and joy as it plays. "
    "The background includes a small, flowing stream and vibrant green foliage, enhancing the peaceful and magical "
    "atmosphere of this unique musical performance."
)
video = pipeline(prompt=prompt, guidance_scale=6, num_inference_steps=50).frames[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
export_to_video(video, "output.mp4", fps=8)
""",
    ),
    Snippet(
        "000:386",
        "Group offloading on a stream",
        "",
        """
pipeline.transformer.enable_group_offload(onload_device=onload_device, offload_device=offload_device, offload_type="leaf_level", use_stream=True, record_stream=True)
""",
    ),
    Snippet(
        "000:398",
        "Group offloading to disk",
        "",
        """
pipeline.transformer.enable_group_offload(onload_device=onload_device, offload_device=offload_device, offload_type="leaf_level", offload_to_disk_path="path/to/disk")

apply_group_offloading(pipeline.text_encoder, onload_device=onload_device, offload_type="block_level", num_blocks_per_group=2, offload_to_disk_path="path/to/disk")
""",
    ),
    Snippet(
        "000:420",
        "Layerwise casting",
        "",
        """
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.utils import export_to_video

transformer = CogVideoXTransformer3DModel.from_pretrained(
    "THUDM/CogVideoX-5b",
    subfolder="transformer",
    torch_dtype=torch.bfloat16
)
transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

pipeline = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b",
    transformer=transformer,
    torch_dtype=torch.bfloat16
).to("cuda")
prompt = (
    "A panda, dressed in a small, red jacket and a tiny hat, sits on a wooden stool in a serene bamboo forest. "
    "The panda's fluffy paws strum a miniature acoustic guitar, producing soft, melodic tunes. Nearby, a few other "
    "pandas gather, watching curiously and some clapping in rhythm. Sunlight filters through the tall bamboo, "
    "casting a gentle glow on the scene. The panda's face is expressive, showing concentration and joy as it plays. "
    "The background includes a small, flowing stream and vibrant green foliage, enhancing the peaceful and magical "
    "atmosphere of this unique musical performance."
)
video = pipeline(prompt=prompt, guidance_scale=6, num_inference_steps=50).frames[0]
print(f"Max memory reserved: {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB")
export_to_video(video, "output.mp4", fps=8)
""",
    ),
    Snippet(
        "000:451",
        "Layerwise casting of parts",
        "",
        """
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.hooks import apply_layerwise_casting

transformer = CogVideoXTransformer3DModel.from_pretrained(
    "THUDM/CogVideoX-5b",
    subfolder="transformer",
    torch_dtype=torch.bfloat16
)

# skip the normalization layer
apply_layerwise_casting(
    transformer,
    storage_dtype=torch.float8_e4m3fn,
    compute_dtype=torch.bfloat16,
    skip_modules_classes=["norm"],
    non_blocking=True,
)
""",
    ),
    Snippet(
        "000:478",
        "Channels last",
        "",
        """
print(pipeline.unet.conv_out.state_dict()["weight"].stride())  # (2880, 9, 3, 1)
pipeline.unet.to(memory_format=torch.channels_last)  # in-place operation
print(
    pipeline.unet.conv_out.state_dict()["weight"].stride()
)  # (2880, 1, 960, 320) having a stride of 1 for the 2nd dimension proves that it works
""",
    ),
    Snippet(
        "000:490",
        "Trace the UNet",
        "",
        """
import time
import torch
from diffusers import StableDiffusionPipeline
import functools

# torch disable grad
torch.set_grad_enabled(False)

# set variables
n_experiments = 2
unet_runs_per_experiment = 50

# load sample inputs
def generate_inputs():
    sample = torch.randn((2, 4, 64, 64), device="cuda", dtype=torch.float16)
    timestep = torch.rand(1, device="cuda", dtype=torch.float16) * 999
    encoder_hidden_states = torch.randn((2, 77, 768), device="cuda", dtype=torch.float16)
    return sample, timestep, encoder_hidden_states


pipeline = StableDiffusionPipeline.from_pretrained(
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    torch_dtype=torch.float16,
    use_safetensors=True,
).to("cuda")
unet = pipeline.unet
unet.eval()
unet.to(memory_format=torch.channels_last)  # use channels_last memory format
unet.forward = functools.partial(unet.forward, return_dict=False)  # set return_dict=False as default

# warmup
for _ in range(3):
    with torch.inference_mode():
        inputs = generate_inputs()
        orig_output = unet(*inputs)

# trace
print("tracing..")
unet_traced = torch.jit.trace(unet, inputs)
unet_traced.eval()
print("done tracing")

# warmup and optimize graph
for _ in range(5):
    with torch.inference_mode():
        inputs = generate_inputs()
        orig_output = unet_traced(*inputs)

# benchmarking
with torch.inference_mode():
    for _ in range(n_experiments):
        torch.cuda.synchronize()
        start_time = time.time()
        for _ in range(unet_runs_per_experiment):
            orig_output = unet_traced(*inputs)
        torch.cuda.synchronize()
        print(f"unet traced inference took {time.time() - start_time:.2f} seconds")
    for _ in range(n_experiments):
        torch.cuda.synchronize()
        start_time = time.time()
        for _ in range(unet_runs_per_experiment):
            orig_output = unet(*inputs)
        torch.cuda.synchronize()
        print(f"unet inference took {time.time() - start_time:.2f} seconds")

# save the model
unet_traced.save("unet_traced.pt")
""",
    ),
    Snippet(
        "000:562",
        "Use the traced UNet",
        "",
        """
import torch
from diffusers import StableDiffusionPipeline
from dataclasses import dataclass

@dataclass
class UNet2DConditionOutput:
    sample: torch.Tensor

pipeline = StableDiffusionPipeline.from_pretrained(
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    torch_dtype=torch.float16,
    use_safetensors=True,
).to("cuda")

# use jitted unet
unet_traced = torch.jit.load("unet_traced.pt")

# del pipeline.unet
class TracedUNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.in_channels = pipe.unet.config.in_channels
        self.device = pipe.unet.device

    def forward(self, latent_model_input, t, encoder_hidden_states):
        sample = unet_traced(latent_model_input, t, encoder_hidden_states)[0]
        return UNet2DConditionOutput(sample=sample)

pipeline.unet = TracedUNet()

with torch.inference_mode():
    image = pipe([prompt] * 1, num_inference_steps=50).images[0]
""",
    ),
    Snippet(
        "000:610",
        "xFormers attention",
        "",
        """
# pip install xformers
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(
    "stabilityai/stable-diffusion-xl-base-1.0",
    torch_dtype=torch.float16,
).to("cuda")
pipeline.enable_xformers_memory_efficient_attention()
""",
    ),
    Snippet(
        "000:624",
        "xFormers attention off",
        "",
        """
pipeline.disable_xformers_memory_efficient_attention()
""",
    ),
    Snippet(
        "001:21",
        "Autocast",
        "",
        """
from torch import autocast
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("CompVis/stable-diffusion-v1-4", use_auth_token=True)
pipe = pipe.to("cuda")

prompt = "a photo of an astronaut riding a horse on mars"
with autocast("cuda"):
    image = pipe(prompt).images[0]  
""",
    ),
    Snippet(
        "001:37",
        "Half precision weights of a branch",
        "",
        """
pipe = StableDiffusionPipeline.from_pretrained(
    "CompVis/stable-diffusion-v1-4",
    revision="fp16",
    torch_dtype=torch.float16,
    use_auth_token=True
)
""",
    ),
    Snippet(
        "001:52",
        "Sliced attention",
        "",
        """
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(
    "CompVis/stable-diffusion-v1-4",
    revision="fp16",
    torch_dtype=torch.float16,
    use_auth_token=True
)
pipe = pipe.to("cuda")

prompt = "a photo of an astronaut riding a horse on mars"
pipe.enable_attention_slicing()
with torch.autocast("cuda"):
    image = pipe(prompt).images[0]  
""",
    ),
    Snippet(
        "002:92",
        "Load any pipeline",
        "",
        """
from diffusers import DiffusionPipeline
# Load from Hugging Face Hub
pipeline = DiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16,
use_safetensors=True
)
# Move to GPU
pipeline = pipeline.to("cuda")
""",
    ),
    Snippet(
        "002:104",
        "Load any model",
        "",
        """
from diffusers import AutoModel, AutoTokenizer
# Load a model from config automatically
model = AutoModel.from_pretrained(
"path/to/model",
torch_dtype=torch.float16,
variant="fp16"
)
""",
    ),
    Snippet(
        "002:112",
        "How a model's class is found",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:122",
        "A model from a single file",
        "names a class that stands for any",
        """
from diffusers import SomeModelClass
# Load from a single checkpoint file
model = SomeModelClass.from_single_file(
"path/to/checkpoint.safetensors",
config="path/to/config.json" # Optional: provide config
)
[!NOTE]
""",
    ),
    Snippet(
        "002:131",
        "How a component is loaded",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:139",
        "A pipeline with code of its own",
        "",
        """
pipeline = DiffusionPipeline.from_pretrained(
"some/model-with-custom-code",
trust_remote_code=True
)
""",
    ),
    Snippet(
        "002:149",
        "Text to image",
        "",
        """
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16
)
pipeline = pipeline.to("cuda")
prompt = "a photo of an astronaut riding a horse on mars"
image = pipeline(prompt).images[0]
image.save("output.png")
""",
    ),
    Snippet(
        "002:160",
        "Image to image",
        "",
        """
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16
)
pipe = pipe.to("cuda")
init_image = load_image("path/to/input.jpg").resize((768, 768))
image = pipe(prompt="modern art style", image=init_image).images[0]
""",
    ),
    Snippet(
        "002:170",
        "ControlNet",
        "",
        """
from diffusers import StableDiffusionControlNetPipeline, ControlNetModel
from diffusers.utils import load_image
import numpy as np
import cv2
# Load controlnet and pipeline
controlnet = ControlNetModel.from_pretrained(
"lllyasviel/sd-controlnet-canny",
torch_dtype=torch.float16
)
pipeline = StableDiffusionControlNetPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
controlnet=controlnet,
torch_dtype=torch.float16
)
# Prepare control image
prompt = "your prompt"
control_image = load_image("path/to/control.jpg")
image = pipeline(prompt, image=control_image).images[0]
""",
    ),
    Snippet(
        "002:190",
        "Another scheduler, Karras",
        "",
        """
from diffusers import StableDiffusionPipeline, DPMSolverMultistepScheduler
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16
)
# Replace default scheduler with DPM++ 2M Karras
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
pipeline.scheduler.config,
use_karras_sigmas=True,
algorithm_type="dpmsolver++"
)
""",
    ),
    Snippet(
        "002:212",
        "How modular components are loaded",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:231",
        "A community pipeline's checkpoint",
        "",
        """
# Load a community pipeline
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
"diffusers/community-pipeline",
variant="v1",
use_safetensors=True
)
""",
    ),
    Snippet(
        "002:250",
        "ControlNet training",
        "the training utilities are not built yet",
        """
from diffusers import (
AutoencoderKL,
ControlNetModel,
DDPMScheduler,
StableDiffusionControlNetPipeline,
UniPCMultistepScheduler,
)
from diffusers.optimization import get_scheduler
# Initialize models
controlnet = ControlNetModel.from_pretrained(
"path/to/controlnet",
torch_dtype=torch.float16
)
pipeline = StableDiffusionControlNetPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
controlnet=controlnet,
torch_dtype=torch.float16
)
""",
    ),
    Snippet(
        "002:284",
        "Move a pipeline or its parts",
        "",
        """
# Move entire pipeline to device
pipeline = pipeline.to("cuda")
# Or move individual components
pipeline.unet = pipeline.unet.to("cuda")
pipeline.vae = pipeline.vae.to("cpu") # Offload VAE to save memory
""",
    ),
    Snippet(
        "002:296",
        "Memory switches",
        "",
        """
# Enable CPU offloading
pipeline.enable_model_cpu_offload()
# Enable sequential CPU offloading
pipeline.enable_sequential_cpu_offload()
# Use attention slicing
pipeline.enable_attention_slicing()
# Enable VAE tiling for large images
pipeline.enable_vae_tiling()
""",
    ),
    Snippet(
        "002:307",
        "Load any model, or a single file",
        "",
        """
# Universal loading attempt pattern
from diffusers import AutoModel
try:
    model = AutoModel.from_pretrained("path/to/model")
except Exception as e:
    # Fallback to single file loading if supported
    model = SomeModelClass.from_single_file("path/to/checkpoint")
""",
    ),
    Snippet(
        "002:368",
        "The base classes, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:390",
        "AutoModel, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:429",
        "Single files, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:449",
        "How a class is recognised",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:497",
        "Another scheduler",
        "",
        """
from diffusers import StableDiffusionPipeline, DDIMScheduler
pipeline = StableDiffusionPipeline.from_pretrained("runwayml/stable-diffusion-v1-5")
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
""",
    ),
    Snippet(
        "002:503",
        "GGUF, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:551",
        "Lazy imports, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:677",
        "From the hub, from a folder",
        "",
        """
from diffusers import StableDiffusionPipeline
# Load from Hugging Face Hub
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16
)
# Load from local directory
pipeline = StableDiffusionPipeline.from_pretrained(
"./local/stable-diffusion-v1-5"
)
""",
    ),
    Snippet(
        "002:691",
        "AutoPipeline",
        "",
        """
from diffusers import AutoPipeline
# Automatically detects pipeline type
pipeline = AutoPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16
)
""",
    ),
    Snippet(
        "002:725",
        "A custom pipeline",
        "",
        """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
custom_pipeline="hf-internal-testing/diffusers-dummy-pipeline",
trust_remote_code=True
)
""",
    ),
    Snippet(
        "002:740",
        "A community pipeline",
        "the community's collection is not on a hub: a copy of the file is given instead",
        """
pipeline = DiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
custom_pipeline="clip_guided_stable_diffusion"
)
""",
    ),
    Snippet(
        "002:759",
        "A modular pipeline",
        "",
        """
from diffusers import ModularPipeline
pipeline = ModularPipeline.from_pretrained(
"path/to/modular/model",
torch_dtype=torch.float16
)
""",
    ),
    Snippet(
        "002:791",
        "Text to image, 50 steps",
        "",
        """
from diffusers import StableDiffusionPipeline
import torch
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16
)
pipeline.to("cuda")
image = pipeline(
prompt="a photo of an astronaut riding a horse on mars",
num_inference_steps=50,
guidance_scale=7.5
).images[0]
""",
    ),
    Snippet(
        "002:814",
        "Another scheduler, DPM-Solver",
        "",
        """
from diffusers import StableDiffusionPipeline, DPMSolverMultistepScheduler
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5"
)
# Replace the default scheduler
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
pipeline.scheduler.config
)
""",
    ),
    Snippet(
        "002:827",
        "A UNet from a single file",
        "single files of tiny networks are tested with loading",
        """
from diffusers import UNet2DConditionModel
model = UNet2DConditionModel.from_single_file(
"https://example.com/model.safetensors",
torch_dtype=torch.float16
)
""",
    ),
    Snippet(
        "002:836",
        "Memory optimisation",
        "",
        """
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16,
use_safetensors=True
)
# Enable attention slicing for lower memory usage
pipeline.enable_attention_slicing()
# Enable sequential CPU offloading
pipeline.enable_sequential_cpu_offload()
# Use xformers memory-efficient attention
pipeline.enable_xformers_memory_efficient_attention()
""",
    ),
    Snippet(
        "002:862",
        "A custom pipeline from its owner",
        "",
        """
pipeline = DiffusionPipeline.from_pretrained(
"owner/custom-pipeline",
custom_pipeline="pipeline_name",
trust_remote_code=True
)
""",
    ),
    Snippet(
        "002:948",
        "A modular pipeline of SDXL",
        "",
        """
from diffusers.modular_pipelines import ModularPipeline
# Load a complete modular pipeline
pipeline = ModularPipeline.from_pretrained(
"stabilityai/stable-diffusion-xl-base-1.0",
torch_dtype=torch.float16
)
""",
    ),
    Snippet(
        "002:970",
        "A component by type hint",
        "modular component specifications are not built yet",
        """
from diffusers import AutoModel
from diffusers.modular_pipelines import ComponentsManager
manager = ComponentsManager()
# Specify type hint for component resolution
manager.add_component(
name="transformer",
pretrained_model_name_or_path="./my_custom_model",
type_hint=AutoModel # or specific class like FluxTransformer2DModel
)
""",
    ),
    Snippet(
        "002:982",
        "A modular pipeline from a single file",
        "single files of tiny networks are tested with loading",
        """
from diffusers.modular_pipelines import ModularPipeline
pipeline = ModularPipeline.from_single_file(
pretrained_model_link_or_path="./checkpoint.safetensors",
original_config="./config.yaml"
)
""",
    ),
    Snippet(
        "002:988",
        "How single files are loaded",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1014",
        "How a guider is chosen",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1052",
        "A modular pipeline of one's own",
        "modular component specifications are not built yet",
        """
from diffusers import (
ModularPipeline,
FluxTransformer2DModel,
FlowMatchEulerDiscreteScheduler,
FlowMatcherGuider
)
# Define custom configuration
custom_config = {
"transformer": {
"type_hint": FluxTransformer2DModel,
"pretrained_model_name_or_path": "custom/model"
},
"scheduler": {
"type_hint": FlowMatchEulerDiscreteScheduler
}
}
# Create pipeline with custom config
pipeline = ModularPipeline.from_config(custom_config)
""",
    ),
    Snippet(
        "002:1071",
        "Mix components",
        "modular component specifications are not built yet",
        """
from diffusers import AutoModel
# Load base pipeline
pipeline = ModularPipeline.from_pretrained("base/pipeline")
# Replace transformer with a custom variant
pipeline.transformer = AutoModel.from_pretrained(
"custom/transformer",
type_hint=type(pipeline.transformer)
)
""",
    ),
    Snippet(
        "002:1080",
        "LoRA in a pipeline",
        "LoRA is not built yet",
        """
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders import PeftAdapterMixin
# Load pipeline with LoRA support
pipeline = StableDiffusionXLPipeline.from_pretrained(
"sdxl/pipeline",
torch_dtype=torch.float16
)
# Load and apply LoRA adapter
pipeline.load_adapters("path/to/lora", adapter_name="my_adapter")
pipeline.set_adapters("my_adapter")
""",
    ),
    Snippet(
        "002:1093",
        "GGUF",
        "quantisation is not built yet",
        """
from diffusers import AutoModel
from diffusers.quantizers.gguf import GGUFQuantizer
# Configure GGUF quantization
quantization_config = GGUFQuantizer(
compute_dtype="float16",
pre_quantized=True,
modules_to_not_convert=["lm_head"]
)
# Load quantized model
model = AutoModel.from_pretrained(
"quantized/model.gguf",
quantization_config=quantization_config,
torch_dtype=torch.float16
)
""",
    ),
    Snippet(
        "002:1120",
        "A component by type hint, again",
        "modular component specifications are not built yet",
        """
from diffusers import AutoModel
manager.add_component(
name="transformer",
pretrained_model_name_or_path="./custom_model",
type_hint=AutoModel # or specific class
)
""",
    ),
    Snippet(
        "002:1135",
        "A modular pipeline from a single file, with code",
        "single files of tiny networks are tested with loading",
        """
pipeline = ModularPipeline.from_single_file(
"./checkpoint.safetensors",
original_config="./config.yaml",
trust_remote_code=True
)
""",
    ),
    Snippet(
        "002:1220",
        "Networks for training",
        "",
        """
# Load pretrained UNet/Transformer
unet = UNet2DConditionModel.from_pretrained(
pretrained_model_name_or_path,
subfolder="unet",
variant=variant,
revision=revision,
)
# Load pretrained VAE for numerical stability
vae = AutoencoderKL.from_pretrained(
pretrained_model_name_or_path,
subfolder="vae",
variant=variant,
revision=revision,
)
# Load pretrained VAE separately if specified
if pretrained_vae_model_name_or_path:
    vae = AutoencoderKL.from_pretrained(pretrained_vae_model_name_or_path)
""",
    ),
    Snippet(
        "002:1263",
        "Attention processors for LoRA training",
        "LoRA is not built yet",
        """
# Enable LoRA training
lora_attn_procs = {}
for name, attn_processor in unet.attn_processors.items():
    # Initialize LoRA attention processors
    ...
unet.set_attn_processor(lora_attn_procs)
unet.train()
""",
    ),
    Snippet(
        "002:1278",
        "DreamBooth's prompts",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1287",
        "ControlNet from a UNet",
        "",
        """
# Initialize ControlNet
controlnet = ControlNetModel.from_unet(unet)
# Prepare ControlNet conditions
control_image = load_control_image(control_image_path)
control_image = controlnet_image_processor.preprocess(control_image)
# Training with ControlNet conditions
with torch.no_grad():
    # Forward pass with ControlNet conditioning
    ...
""",
    ),
    Snippet(
        "002:1299",
        "A teacher",
        "",
        """
# Teacher model for distillation
teacher_unet = UNet2DConditionModel.from_pretrained(
pretrained_model_name_or_path,
subfolder="unet",
)
""",
    ),
    Snippet(
        "002:1313",
        "FLUX's transformer",
        "",
        """
# Flux-specific model loading
transformer = FluxTransformer2DModel.from_pretrained(
pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
subfolder="transformer",
)
""",
    ),
    Snippet(
        "002:1326",
        "Training utilities",
        "the training utilities are not built yet",
        """
from diffusers.training_utils import (
FreeKLScheduler,
compute_snr,
scale_lora,
unet_lora_state_dict,
)
""",
    ),
    Snippet(
        "002:1488",
        "How a pipeline's part is loaded",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1540",
        "Loading LoRA, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1550",
        "The LoRA mixin, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1572",
        "The PEFT mixin, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1594",
        "The textual inversion mixin, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1620",
        "The IP-Adapter mixin, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1655",
        "How quantisation is resolved",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1670",
        "Component specifications, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1683",
        "How a type hint is found",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1694",
        "A standard pipeline",
        "",
        """
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5",
torch_dtype=torch.float16,
use_safetensors=True,
)
""",
    ),
    Snippet(
        "002:1701",
        "LoRA",
        "LoRA is not built yet",
        """
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(
"stabilityai/stable-diffusion-xl-base-1.0"
)
pipeline.load_lora_weights("path/to/lora_weights")
# Generate with LoRA
image = pipeline(prompt).images[0]
""",
    ),
    Snippet(
        "002:1709",
        "Several LoRAs",
        "LoRA is not built yet",
        """
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5"
)
# Load multiple LoRA adapters
pipeline.load_lora_weights("adapter_1", adapter_name="style_1")
pipeline.load_lora_weights("adapter_2", adapter_name="style_2")
# Use with different weights
pipeline.set_adapters(["style_1"], weights=[1.0])
""",
    ),
    Snippet(
        "002:1719",
        "Textual inversion",
        "textual inversion is not built yet",
        """
pipeline = StableDiffusionPipeline.from_pretrained(
"runwayml/stable-diffusion-v1-5"
)
pipeline.load_textual_inversion(
"path/to/textual_inversion",
token="my-concept"
)
image = pipeline("a photo of my-concept").images[0]
""",
    ),
    Snippet(
        "002:1840",
        "GGUF's requirements, in outline",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1890",
        "GGUF in a pipeline",
        "quantisation is not built yet",
        """
from diffusers import DiffusionPipeline
import torch
pipeline = DiffusionPipeline.from_pretrained(
"model/path",
quantization_config={
"quantization_method": "gguf",
"gguf_format": "q4_k", # or q5_k, q8_0, etc.
},
torch_dtype=torch.float16,
device_map="auto"
)
""",
    ),
    Snippet(
        "002:1902",
        "bitsandbytes",
        "quantisation is not built yet",
        """
from diffusers import DiffusionPipeline
from transformers import BitsAndBytesConfig
quantization_config = BitsAndBytesConfig(
load_in_4bit=True,
bnb_4bit_compute_dtype=torch.float16,
bnb_4bit_quant_type="nf4",
bnb_4bit_use_double_quant=True
)
pipeline = DiffusionPipeline.from_pretrained(
"model/path",
quantization_config=quantization_config
)
""",
    ),
    Snippet(
        "002:1930",
        "How single files are loaded, again",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1951",
        "How quantisation is resolved, again",
        "an excerpt of the peer's source, or a skeleton with parts left out: nothing to run",
        "",
    ),
    Snippet(
        "002:1965",
        "Little memory",
        "quantisation is not built yet",
        """
from diffusers import DiffusionPipeline
import torch
pipeline = DiffusionPipeline.from_pretrained(
"stabilityai/stable-diffusion-xl-base-1.0",
quantization_config={
"quantization_method": "bitsandbytes",
"load_in_4bit": True,
},
torch_dtype=torch.float16,
device_map="auto"
)
# Generate image
result = pipeline(prompt="a beautiful landscape")
""",
    ),
    Snippet(
        "002:1979",
        "GGUF in a pipeline, again",
        "quantisation is not built yet",
        """
from diffusers import DiffusionPipeline
import torch
# Load a GGUF quantized model
pipeline = DiffusionPipeline.from_pretrained(
"quantized/model/path",
quantization_config={
"quantization_method": "gguf",
"gguf_format": "q4_k_m",
},
torch_dtype=torch.float16,
device_map="auto"
)
""",
    ),
    Snippet(
        "002:1993",
        "Mixed quantisation",
        "quantisation is not built yet",
        """
from diffusers import DiffusionPipeline
from transformers import BitsAndBytesConfig
# Quantize UNet with 4-bit, keep VAE in full precision
pipeline = DiffusionPipeline.from_pretrained(
"model/path",
unet_quantization_config=BitsAndBytesConfig(load_in_4bit=True),
vae_quantization_config=None, # Full precision VAE
)
""",
    ),
]
