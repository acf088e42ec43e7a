import pytest

from bench.roofline import Ceilings, Work, experts_visited, launch_gaps_s, layer_ops, step_floor_s, step_ops, total_bytes
from bench.shapes import full_config, named_config
from workers.model_config import ModelConfig

H100 = Ceilings(bytes_per_s=3.0e12, bf16_flops=790e12, fp8_flops=1500e12)
V2_LITE = ModelConfig.parse(named_config("v2-lite"))


@pytest.mark.parametrize(("batch", "context", "floor_ms"), [(1, 1024, 1.65), (16, 4096, 9.07), (64, 4096, 13.2), (256, 1024, 13.8)])
def test_decode_floors_of_v2_lite_on_an_h100(batch: int, context: int, floor_ms: float) -> None:
    assert step_floor_s(V2_LITE, Work.decode(batch, context), H100) * 1e3 == pytest.approx(floor_ms, rel=5e-3)


def test_prefill_floor_of_v2_lite_on_an_h100() -> None:
    assert 8192 / step_floor_s(V2_LITE, Work.prefill(8192, 1024), H100) == pytest.approx(143_200, rel=2e-3)


def test_one_fp8_layer_of_v3_reads_a_byte_per_weight() -> None:
    config = ModelConfig.parse(named_config("v3-layers:2"))
    floor_s = sum(op.floor_s(H100) for op in layer_ops(config, Work.decode(128, 4096), 0))
    assert floor_s * 1e3 == pytest.approx(4.04, rel=5e-3)
    assert {op.rate for op in step_ops(config, Work.decode(1, 64)) if "experts" in op.name and op.num_flops} == {"fp8"}


def test_counted_experts_replace_uniform_routing() -> None:
    assert V2_LITE.moe is not None
    assert experts_visited(V2_LITE.moe, 16) == pytest.approx(50.7, abs=0.1)
    few, uniform = (total_bytes(step_ops(V2_LITE, Work.decode(16, 1024, experts))) for experts in (6.0, None))
    assert few < 0.3 * uniform


def test_gaps_grow_with_layers() -> None:
    assert launch_gaps_s(V2_LITE, Ceilings(launch_s=1e-6)) == pytest.approx(27 * 14e-6)


def test_models_without_latent_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="latent attention"):
        step_ops(ModelConfig.parse(full_config("llama")), Work.decode(1, 1))
