"""What peft calls the parameters of a model with adapters."""


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name of a parameter or a module in the model without adapters."""
    plain = name.removeprefix("base_model.model.")
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save.default."):
        plain = plain.replace(wrapper, ".")
    return plain
