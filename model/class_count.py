"""What every model asks of its number of classes."""

from model.errors import InputError


def check_num_classes(num_classes: int) -> None:
    """Raises InputError if `num_classes` is below 1."""
    if num_classes < 1:
        raise InputError(
            f"num_classes = {num_classes} leaves the model without outputs: make it at least 1"
        )
