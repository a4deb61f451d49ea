"""The flags of stock megatron-core: each is a rung of the ladder to its best configuration.

A new one is named here, with the variables that it needs; what it sets of megatron-core is in
`stock_settings.py`, and what it does beyond settings in `stock_megatron.py`.
"""

RUNGS = (
    # Variables of the process: `ENVIRONMENT` in spec.py.
    "environment",
    # Megatron's experimental Triton kernels between DeepEP and the permutation.
    "experimental",
    # Gradients are summed in BF16, and the precision-aware optimizer takes them; its states stay
    # float32.
    "bf16_grads",
    # CUDA graphs of the router and what follows it; needs megatron-core 0.19.
    "graphs",
    # Those, and of attention.
    "attention_graphs",
    # TransformerEngine's CUTLASS GEMM of all experts (BF16).
    "cutlass",
    # TransformerEngine's operation fuser, whose cuBLAS GEMM is one for all experts; needs
    # megatron-core 0.19 and cuBLAS 13.6.
    "grouped",
    # Dispatch of one micro-batch beside the computation of another; needs at least two a step.
    "ep_overlap",
    # FP8: pad each expert's rows in the routing map, not in a pass of its own.
    "router_padding",
    # FP8: keep weights in FP8 between steps, and gather them in FP8; it begins with weights of its
    # own.
    "fp8_param",
    # Gradients and weights are communicated after the computation, not during it.
    "no_overlap",
    # TransformerEngine's weight gradients are not added to megatron's in the GEMM.
    "no_wgrad_fusion",
)

RUNG_ENVIRONMENT = {
    "cutlass": {"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"},
    # megatron-core requires it before it uses the fuser; Hopper then runs operations one by one.
    "grouped": {"NVTE_CUTEDSL_FUSED_GROUPED_MLP": "1"},
}
"""What the environment of a process must say before TransformerEngine is loaded, by rung."""
