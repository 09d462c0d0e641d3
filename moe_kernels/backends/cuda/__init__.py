def supports(op, problem):
    return "moe_kernels._C is not built"
