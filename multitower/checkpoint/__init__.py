"""A fused model on disk.

    folder/  fusion.json             format version, graph, fingerprint of each tower, checksum of each file,
                                     modalities, which tensors are in each file
             links.safetensors       links and input adapters
             towers/<name>/          the model of a tower that was trained whole or has no other origin
             towers/<name>/adapter/  the peft adapters of a tower, as peft saves and loads them
             modalities/<name>/      the modality of a tower, where one was given

Untouched pretrained models, peft adapters on them or not, are referred to, not copied, unless asked. What is
stored of a model with adapters is the model without them, as if peft had never touched it. Of towers that
share one model the first is written so, and the others name it (``shared_with``). All of this is specified in
``docs/format.md``.
"""
