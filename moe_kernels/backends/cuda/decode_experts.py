"""decode_experts: launches ``csrc/decode_experts.cu``, on copies of rows that can't be read 16 bytes at a time.

Everything but the expert weights is made contiguous; fp64 routing weights are read as fp32.
"""

from torch import Tensor

from moe_kernels.backends.cuda._extension import (
    activation_arguments,
    address,
    aligned_rows,
    dtype_codes,
    launch,
    num_sms,
    weights_of,
)


def decode_experts(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    w_END: Tensor,
    bias_EN: Tensor | None,
    w_EDI: Tensor,
    bias_ED: Tensor | None,
    activation: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    (tokens, hidden), inner, rows = x_TD.shape, w_EDI.shape[2], indices_TK.numel()
    if rows == 0:
        return x_TD.new_zeros(tokens, hidden)
    # Few tokens are soon copied; weights are copied only where their rows can't be read 16 bytes at a time.
    x_TD = aligned_rows(x_TD.contiguous())
    w_END, w_EDI = aligned_rows(w_END), aligned_rows(w_EDI)
    indices_TK, weights_TK = indices_TK.contiguous(), weights_TK.contiguous()
    if weights_TK.dtype not in dtype_codes():
        weights_TK = weights_TK.float()
    bias_EN = None if bias_EN is None else bias_EN.contiguous()
    bias_ED = None if bias_ED is None else bias_ED.contiguous()
    out_TD = x_TD.new_empty(tokens, hidden)
    scratch = x_TD.new_empty(rows * (inner + hidden))  # A [R, I], then Y [R, D]
    a = address(scratch)
    launch(
        "decode_experts",
        x_TD.device,
        out=address(out_TD),
        a=a,
        y=a + rows * inner * scratch.element_size(),
        x=address(x_TD),
        indices=address(indices_TK),
        index_bytes=indices_TK.element_size(),
        routing_weights=address(weights_TK),
        routing_weights_dtype=dtype_codes()[weights_TK.dtype],
        gate_up=weights_of(w_END),
        bias_gate_up=address(bias_EN),
        down=weights_of(w_EDI),
        bias_down=address(bias_ED),
        tokens=tokens,
        top_k=indices_TK.shape[1],
        num_experts=w_END.shape[0],
        **activation_arguments(activation, alpha, limit, interleaved),
        dtype=dtype_codes()[x_TD.dtype],
        num_sms=num_sms(x_TD.device),
    )
    return out_TD
