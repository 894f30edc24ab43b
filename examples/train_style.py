"""Train a style from one picture: python examples/train_style.py chalk.png car [STEPS]"""

import sys

from qrlora import Recipe, train

image, noun, *steps = sys.argv[1:]
recipe = Recipe(role="style", images=image, noun=noun, steps=int((steps or ["200"])[0]), output="style.safetensors")
adapter = train(recipe, progress=lambda at: print(f"step {at.step} of {at.steps}, loss {at.loss:.4f}"))
count = adapter.parameters()
print(f"{count.trained} trained parameters; a LoRA of this rank has {count.lora_same_rank}")
