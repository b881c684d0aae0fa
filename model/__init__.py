"""What the network computes. Knows torch, einops and safetensors; neither ComfyUI nor training."""
