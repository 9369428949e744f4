"""Bytes of a compiled program, read from its text."""

import jax
import jax.numpy as jnp
import pytest

from flora_jax.kernels import hlo

PROGRAM = """HloModule jit_f

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[8]{0}) tuple(%j, %y)
}

ENTRY %main (a: f32[8], s: s32[]) -> bf16[4,2] {
  %a = f32[8]{0} parameter(0)
  %s = s32[] parameter(1)
  %start = (s32[], f32[8]{0}) tuple(%s, %a)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %out = f32[8]{0} get-tuple-element(%loop), index=1
  %seen = f32[4,2]{1,0} bitcast(%out)
  %mine = bf16[4,2]{1,0} custom-call(%seen), custom_call_target="mosaic_gpu_v2"
  ROOT %other = bf16[4,2]{1,0} custom-call(%mine, /*index=1*/%seen), custom_call_target="gemm"
}
"""


def test_every_instruction_reads_and_writes_once():
    loop = 64 + 9  # what is fused inside is not written
    assert hlo.moved(PROGRAM, but="mosaic_gpu") == loop + 16 + 16 + 32
    assert hlo.moved(PROGRAM, but="nothing") == loop + 16 + 16 + 32 + 32 + 16


@pytest.mark.optimised
def test_agrees_with_what_xla_counts_here():
    def f(x, y):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ y) + x, None), x, length=3)[0]

    x, y = jnp.ones((64, 128)), jnp.ones((128, 128))
    compiled = jax.jit(f).lower(x, y).compile()
    counted = compiled.cost_analysis()["bytes accessed"]
    assert hlo.moved(compiled.as_text(), but="nothing") == pytest.approx(counted, rel=0.1)
