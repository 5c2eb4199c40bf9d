"""Encoders leave Python: torch.export with a dynamic batch, its files, AOTInductor, in a process with the ops alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import jepa_kernels as jk
from jepa_kernels.nn import Encoder
from jepa_kernels.testing import hold

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
EACH = {0: Dim.AUTO}
LOADS = """
import sys, torch, jepa_kernels
program, compiled, cases = sys.argv[1:]
assert not [name for name in sys.modules if name.startswith(("jepa_kernels.nn", "jepa_kernels.models"))]
cases, exported = torch.load(cases), torch.export.load(program).module()
compiled = torch._inductor.aoti_load_package(compiled)
torch.save([(exported(*inputs), compiled(*inputs)) for inputs in cases], sys.argv[3])
"""


@pytest.fixture(scope="module", autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images():
    """I-JEPA's, of images, every patch: exported once, with any number of images."""
    encoder, inputs = Encoder(16, 8, 48, depth=1, num_heads=2).eval(), (torch.randn(5, 3, 16, 16),)
    with torch.no_grad():
        return encoder, inputs, torch.export.export(encoder, (inputs[0][:2],), dynamic_shapes=(EACH,))


@pytest.fixture(scope="module")
def clips():
    """V-JEPA 2's, of clips of 2 x 2 x 2 patches."""
    return Encoder(16, 8, 48, depth=2, num_heads=2, tubelet_size=2, rope="tiled").eval()


def kept(clips):
    """Five patches of each."""
    return torch.stack([torch.arange(8).roll(n)[:5].sort().values for n in range(clips)])


def kernels(program):
    names = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("jepa_kernels.")}
    return {name.split(".")[1] for name in names}


def test_an_image_encoder_takes_any_batch(images):
    encoder, (pixels,), program = images
    assert kernels(program) == {"embed_patches", "masked_attention_qkv"}
    for some in (pixels, pixels[:2], pixels[:3]):
        assert torch.equal(program.module()(some), encoder(some))


def test_a_video_encoder_takes_any_number_of_clips_and_kept_patches(clips):
    pixels, ids = torch.randn(4, 3, 4, 16, 16), kept(4)
    with torch.no_grad():
        shapes = EACH, {0: Dim.AUTO, 1: Dim.AUTO}
        program = torch.export.export(clips, (pixels[:3], ids[:3]), dynamic_shapes=shapes)
        for some in ((pixels, ids), (pixels[:2], ids[:2, :4].contiguous())):
            assert torch.equal(program.module()(*some), clips(*some))


def test_a_video_encoder_takes_packed_patches_of_given_lengths(clips):
    packing = jk.Packing.from_lengths([3, 5, 2, 8])
    first, second = torch.randn(2, 4, 3, 4, 16, 16)
    ids = torch.cat([torch.arange(n) for n in packing.lengths])
    with torch.no_grad():
        program = torch.export.export(clips, (first, ids, packing))
        assert torch.equal(program.module()(second, ids, packing), clips(second, ids, packing))


def test_files_give_the_same_where_the_ops_alone_are_imported(images, tmp_path):
    """The exported program has eager's bits; AOTInductor's own norms and GELU are within the error budget."""
    encoder, (pixels,), program = images
    files = [str(tmp_path / name) for name in ("program.pt2", "compiled.pt2", "cases.pt")]
    torch.export.save(program, files[0])
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.vec_isa_ok": True}
    torch._inductor.aoti_compile_and_package(program, package_path=files[1], inductor_configs=quick)
    cases = [(pixels,), (pixels[:3],)]
    torch.save(cases, files[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOADS, *files], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    with torch.no_grad(), jk.use_backend("reference"):
        exact = [encoder.double()(*(x.double() for x in inputs)) for inputs in cases]
        eager = [encoder.float()(*inputs) for inputs in cases]
    with torch.no_grad():
        ours = [encoder(*inputs) for inputs in cases]
    for n, (exported, compiled) in enumerate(torch.load(files[2])):
        assert torch.equal(exported, ours[n])
        assert hold("compiled", compiled, exact[n], eager[n]).ok
