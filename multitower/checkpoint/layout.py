"""What the files of a checkpoint are called."""

LINKS, TOWERS, WEIGHTS = "links.safetensors", "towers", "model.safetensors"
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
