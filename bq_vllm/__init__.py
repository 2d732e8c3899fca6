"""vLLM plugin for butterfly-quantized checkpoints. Importing it imports neither vLLM nor torch."""

from __future__ import annotations


def register() -> None:
    """Make `--quantization butterfly` known to vLLM: the entry point of group `vllm.general_plugins`.

    vLLM calls it in the API server, in the engine and in every worker. An exception here would stop vLLM for every
    model, so errors are logged instead. A second call changes nothing.
    """
    try:
        from bq_kernels.format import QUANT_METHOD
        from vllm.model_executor.layers.quantization import register_quantization_config

        from . import backend
        from .config import ButterflyConfig

        register_quantization_config(QUANT_METHOD)(ButterflyConfig)

        # vLLM keys its cache of compiled graphs by the variables in this table: a setting must not run another's graph
        from vllm.envs import environment_variables

        environment_variables[backend.BACKEND_VARIABLE] = backend.chosen_backend
        environment_variables[backend.ACTIVATION_BITS_VARIABLE] = backend.chosen_activation_bits
        environment_variables[backend.FUSE_NORM_VARIABLE] = backend.chosen_fuse_norm
    except Exception:
        import logging  # vllm.logger may be what failed to import; vLLM's handlers take this name as well

        logging.getLogger("vllm.bq_vllm").exception("quantization 'butterfly' is not available: the plugin failed")
