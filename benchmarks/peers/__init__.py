"""The same layer sweep as others do it.

Each module has ``ways(module, data)``: functions by name, each of which returns logits ``[layer, example,
class]`` of an interchange of ``data["edited"]`` with ``data["source_tokens"]`` (patch indices ``[example,
k]``) at every block output of a HuggingFace ViT. Each peer is driven as its own documentation does it, with
what it offers against doing work twice.
"""
