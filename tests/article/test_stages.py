"""Which stage a kernel or operation belongs to, and where a step's time went."""

import pytest
import torch
from article import stages


@pytest.mark.parametrize(
    "stage, name",
    [
        ("GEMM", "void anabranch::hopper::grouped_gemm_kernel<__nv_bfloat16, Shape<(Operation)1, 2, 128, true> >"),
        ("GEMM", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"),
        ("GEMM", "void anabranch::sum_parts_kernel<__nv_bfloat16>(float const*, long, long, bool, __nv_bfloat16*)"),
        ("GEMM", "void cutlass::Kernel2<Iterator<cutlass::MatrixShape<8, 8>, cutlass::layout::NoPermute, false> >"),
        ("GEMM", "void anabranch::block_sparse::tensor_cores_kernel<Shape<__half, 64, (Product)1, true> >"),
        ("topology", "anabranch::block_sparse::first_rows_kernel(long const*, long, long, long*)"),
        ("permutation", "void anabranch::cuda::scatter_rows_kernel<uint4>(uint4 const*, long const*, long const*)"),
        ("combination", "void anabranch::cuda::sum_rows_kernel<__nv_bfloat16, 8, 2>(RowSum<__nv_bfloat16>)"),
        ("activation", "aten::gelu"),
        ("routing", "aten::softmax"),
        ("other", "aten::zeros"),
    ],
)
def test_by_its_name(stage, name):
    assert stages.stage_of_kernel(name) == stage


def test_a_step_by_stage():
    x = torch.randn(300, 200)

    def step():
        for _ in range(3):
            with torch.profiler.record_function("permute"):
                x.index_select(0, torch.arange(300)).sin()
        torch.mm(x, x.T)

    times, longest = stages.profile(step, cuda=False)
    assert set(times) == set(stages.STAGES) and all(ms >= 0 for ms in times.values())
    assert times["permutation"] > 0 and times["GEMM"] > 0
    assert longest["GEMM"] == "aten::mm"
    assert set(longest) >= {"permutation", "GEMM"} and "routing" not in longest
