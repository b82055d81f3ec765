"""The pictogram set: openly licensed icons and emoji with their authors' words as labels."""
