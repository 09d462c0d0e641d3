"""benchmarks/floors.toml as it is committed: sound, and of rows that the benchmarks and checks make."""

from benchmarks import floors
from benchmarks.floors import Unless
from moe_kernels.bench import block, decode, extra, first_layer, model, ops, peers, router
from moe_kernels.bench.shapes import ALL_SHAPES, DEFAULT_SHAPES, ROUTINGS, ROW_SHAPES, SHAPES
from tests.gpu import checks, soak, test_sanitizers


def test_the_committed_file_is_sound():
    found = floors.read()
    assert len({floor.issue for floor in found}) == 4
    assert len(found) == len(set(found)), "a floor twice"
    assert {floor.gpu for floor in found} == {"nvidia-h100-80gb-hbm3"}
    for floor in found:
        assert "{" not in floor.what + floor.row + floor.metric
        assert floor.value >= 0


def rows_that_benchmarks_make() -> set[tuple[str, str]]:
    """(file, row) of everything that ``pytest benchmarks`` can measure, and what ``tests/gpu`` can check."""
    shapes = [SHAPES[name] for name in ALL_SHAPES]
    main = DEFAULT_SHAPES[0]
    made = {(block.FILE, case.name) for shape in shapes for case in block.cases(shape, ROUTINGS)}
    made |= {(block.FILE, f"block/{shape.name}/uniform/{peer}") for shape in shapes for peer in peers.PEERS}
    made |= {(ops.FILE, f"op/{op}/{shape.name}/{backend}") for shape in shapes for op, backend in ops.cases()}
    made |= {(ops.FILE, f"op/{op}/{of}/{by}") for of in ROW_SHAPES for op in ops.ROW_PRODUCTS for by in ops.BACKENDS}
    made |= {(model.FILE, f"layer/{main}/first_{what}") for what in first_layer.WHAT}
    made |= {(router.FILE, f"op/{op}/{of.name}/{backend}") for of, op, backend in router.cases()}
    made |= {
        (decode.FILE, f"decode/{main}/T{tokens}/{name}") for tokens in decode.TOKENS for name in decode.IMPLEMENTATIONS
    }
    made |= {(extra.FILE, f"{what}/{main}/{extra.OURS}") for what in ("autocast", "graph", "compile", "host")}
    made.add((extra.FILE, f"compile/{main}/{extra.ACCUMULATE}"))
    made |= {
        (model.FILE, f"model/{sizes}/{row}")
        for sizes in model.SIZES
        for row in ("first_step", *(dense + experts for dense in ("", model.LIGER) for experts in model.EXPERTS))
    }
    made |= {(checks.FILE, f"soak/{kind}") for kind in soak.KINDS}
    made |= {(checks.FILE, f"sanitizer/{tool}") for tool in test_sanitizers.TOOLS}
    return made


def test_floors_of_the_benchmark_suite_name_rows_that_it_makes():
    made = rows_that_benchmarks_make()
    triton = [floor for floor in floors.read() if "on Triton" in floor.issue]
    assert len(triton) > 20
    named = [(floor.file, row) for floor in triton for row in (floor.row, floor.times_row) if row is not None]
    assert [name for name in named if name not in made] == []


def test_floors_of_the_cuda_kernels_name_rows_that_it_makes():
    made = rows_that_benchmarks_make()
    cuda = [floor for floor in floors.read() if floor.issue.startswith("CUDA")]
    named = {(floor.file, row) for floor in cuda for row in (floor.row, floor.times_row) if row is not None}
    assert len(named) > 80
    assert named <= made
    experts = {floor.row for floor in cuda if floor.what.startswith("experts fwd+bwd")}
    every_shape = {case.name for name in ALL_SHAPES for case in block.on_every_shape(SHAPES[name])}
    assert experts == {name for name in every_shape if name.endswith("/moe_kernels")}


def test_floors_of_routers_name_rows_that_it_makes():
    made, routers = rows_that_benchmarks_make(), ("topk_route", "topk_route_bwd", "router")
    named = {(f.file, f.row) for f in floors.read() if f.file == router.FILE and f.row.split("/")[1] in routers}
    assert len(named) == 10 and named <= made
    fused = {(f.file, f.row) for f in floors.read() if f.row.endswith("/moe_kernels_fused_router")}
    assert fused and fused <= made


def test_ops_may_leave_a_shape_to_triton():
    excused = [floor for floor in floors.read() if floor.unless is not None]
    assert excused
    for floor in excused:
        assert floor.unless == Unless(floor.times_row, "default_backend", "triton")
