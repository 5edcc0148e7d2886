"""The wrapper with our site names, a remote request without a server, and who imports nnsight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel

import vit_mechinterp as vmi
from tests.tiny_models import HF_VIT, TIMM_PLAIN, Tiny
from vit_mechinterp.bridges.nnsight import sited
from vit_mechinterp.bridges.parity_runs import parity_data, parity_runs
from vit_mechinterp.engine.backends import BACKENDS
from vit_mechinterp.errors import ExecutionError, SpecError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT], ids=lambda tiny: tiny.name)
def test_sites_are_accessors_inside_a_trace(tiny: Tiny) -> None:
    vit = vmi.wrap(tiny.module())
    images = tiny.images(2)
    logits, cache = vit.run(images, capture=["blocks.1.resid_post", "blocks.1.mlp.post"])
    model = sited(vit)
    with model.trace(images):
        post = model.site("blocks.1.mlp.post").input.save()
        stream = model.site("blocks.1.resid_post").output.save()
        model.site("blocks.1.resid_post").output = stream * 2
        edited = model.output.save()
    assert torch.equal(stream, cache["blocks.1.resid_post"])
    assert torch.equal(post, cache["blocks.1.mlp.post"])
    with vit.hooks({"blocks.1.resid_post": lambda h: h * 2}):
        ours = vit(images)
    assert torch.equal(vit.layout.outcome(edited), ours)
    assert not torch.allclose(ours, logits)
    assert model.place("blocks.1.mlp.post")[1] == "input"
    with pytest.raises(SpecError, match="not what enters or leaves a module"):
        model.site("blocks.0.attn.pattern")


def test_a_request_is_built_and_runs_where_our_package_is_not() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    images = TIMM_PLAIN.images(2)
    _, cache = vit.run(images, capture=["blocks.1.resid_post"])
    model = sited(vit)
    block, net = model.site("blocks.1.resid_post"), model.model
    with model.trace(images, remote="local"):
        stream = block.output.save()
        block.output = stream * 2
        logits = net.output.save()
    assert torch.equal(stream, cache["blocks.1.resid_post"])
    with vit.hooks({"blocks.1.resid_post": lambda h: h * 2}):
        torch.testing.assert_close(logits, vit(images))

    with pytest.raises(SpecError, match="no checkpoint of the Hub"):
        model.trace(images, remote=True)
    vit.source = "hf/facebook/dinov2-base"
    with pytest.raises(SpecError, match="A deployment of facebook/dinov2-base loads another class than VisionTransformer"):
        model.request_to(True)


def test_an_experiment_runs_as_requests() -> None:
    vit = vmi.wrap(HF_VIT.module())
    data, (documents, tensors) = parity_data(vit), parity_runs(vit)
    model = sited(vit)
    clean = vit(data["base"])
    for name in ("four interventions in one run", "path patching: a run reads another run", "interchange of one head's attn.z"):
        runs = documents[name]
        ours = vmi.execute(vit, runs, data, tensors).logits
        theirs = model.execute(runs, data, tensors, remote="local", batch_size=2, progress=False)
        assert float((theirs.logits - ours).abs().max()) < 1e-5 * float(clean.detach().abs().max())
        assert float((ours[-1] - clean).detach().abs().max()) > 1e-2
        assert theirs.provenance["backend"]["name"] == "nnsight, remote='local'"
    assert "nnsight, remote='local'" not in BACKENDS
    with pytest.raises(SpecError, match=r"attn\.pattern lies within the attention call, and a request reads"):
        model.execute(documents["interchange of attn.pattern"], data, remote="local")


def test_a_request_is_what_nnsights_own_model_of_the_checkpoint_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = HF_VIT.module()
    module.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    monkeypatch.setitem(huggingface._ID_CACHE, str(tmp_path), "google/vit-base-patch16-224")
    there = TransformersModel(str(tmp_path), task="image-classification", dispatch=True)
    vit, images = vmi.wrap(module), HF_VIT.images(2)
    vit.source = "hf/google/vit-base-patch16-224"
    model = sited(vit)
    request = model.request_to("https://ndif.example")
    assert request.host == "https://ndif.example"
    assert (request.model_key, request.env) == (there.to_model_key(), there._remoteable_get_env())

    block, net = model.site("blocks.1.resid_post"), model.model
    with net.trace(images, backend=LocalSimulationBackend(there)):
        block.output = block.output * 2
        output = net.output.save()
    with vit.hooks({"blocks.1.resid_post": lambda h: h * 2}):
        torch.testing.assert_close(output.logits, vit(images))


def test_a_deployment_that_cannot_be_reached_is_named() -> None:
    vit = vmi.wrap(HF_VIT.module())
    data = parity_data(vit)
    model, run = sited(vit), vmi.Run(name="r")
    with pytest.raises(SpecError, match="no checkpoint of the Hub"):
        model.execute(run, data, remote=True)
    vit.source = "hf/google/vit-base-patch16-224"
    with pytest.raises(SpecError, match=r"remote='nowhere': .*Write True, 'local' or 'https://\.\.\.'"):
        model.execute(run, data, remote="nowhere")
    with pytest.raises(ExecutionError, match=r"deployment at http://localhost:9 cannot be reached: .*nnsight\.CONFIG\.API\.HOST"):
        model.execute(run, data, remote="http://localhost:9")


PLAIN = """
import sys
from timm.models.vision_transformer import VisionTransformer
import torch, vit_mechinterp as vmi
vmi.bridges
vit = vmi.wrap(VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval())
data = {"base": torch.randn(2, 3, 32, 32), "source": torch.randn(2, 3, 32, 32)}
run = vmi.Run(name="r", interventions=[vmi.Interchange(site="blocks.0.resid_post", source="source")])
ours, hooks = vmi.execute(vit, run, data), vmi.execute(vit, run, data, backend="hooks")
assert float((ours.logits - hooks.logits).abs().max()) < 1e-5
import vit_mechinterp.cli, vit_mechinterp.circuits
loaded = {"nnsight", "pyvene", "transformer_lens"} & set(sys.modules)
assert not loaded, loaded
assert not hasattr(object, "save")
backward = torch.Tensor.backward
vmi.execute(vit, run, data, backend="nnsight")
assert "nnsight" in sys.modules and hasattr(object, "save") and torch.Tensor.backward is not backward
assert not {"pyvene", "transformer_lens"} & set(sys.modules)
"""


def test_plain_use_imports_none_of_the_packages_and_changes_no_builtin() -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
