"GGUF files, written by gguf's own writer, and the protocol of published comparisons"
from itertools import islice
import numpy as np
import pytest
from click.testing import CliRunner

from optiq.calibration import passages
from optiq.cli import main
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.score import run_task

class Gguf:
    "Writes checkpoints as llama.cpp's converter does"
    def __init__(self): self.lib = pytest.importorskip('gguf', reason='needs the gguf extra')

    def write(self, c, file, arch, kind, turned=False, leave=''):
        import torch
        from safetensors.torch import load_file
        lib, kind = self.lib, self.lib.GGMLQuantizationType[kind]
        state = {k: v.to(torch.float32).numpy() for f in c.files for k, v in load_file(f).items()}
        out, name_of = lib.GGUFWriter(file, arch), lib.get_tensor_name_map(lib.MODEL_ARCH[arch.upper()], c.config['num_hidden_layers']).get_name
        out.add_block_count(c.config['num_hidden_layers'])
        for u in c.units:
            w = state[f'{u.path}.weight']
            heads = dict(q_proj=c.config['num_attention_heads'], k_proj=c.config['num_key_value_heads']).get(u.kind)
            if turned and heads: w = np.ascontiguousarray(w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape))
            if u.path != leave: out.add_tensor(f'{name_of(u.path)}.weight', lib.quantize(w, kind), raw_dtype=kind)
        for step in ('write_header_to_file', 'write_kv_data_to_file', 'write_tensors_to_file', 'close'): getattr(out, step)()
        return str(file)

@pytest.fixture(scope='module')
def gguf(): return Gguf()

@pytest.fixture(scope='module')
def llama(tmp_path_factory): return Checkpoint(tiny('llama', tmp_path_factory.mktemp('tiny')/'llama'))

def scored(file, c, cache, **options): return run_task('kl', file, str(c.folder), 2, seq_len=32, cache=cache, **options)

@pytest.mark.parametrize('turned', [False, True])
def test_what_is_not_rounded_is_the_model(gguf, llama, tmp_path, turned):
    file = gguf.write(llama, tmp_path/'m.gguf', 'llama', 'F32', turned)
    a, row = scored(file, llama, tmp_path).rows
    assert abs(row['kl']) < 1e-6 and row['flips'] == 0 and row['name'] == 'm.gguf' and row['perplexity'] == pytest.approx(a['perplexity'])
    units = sum(u.params for u in llama.units)
    assert row['true_bpw'] == pytest.approx(32*units/llama.params)

@pytest.mark.parametrize('backend', ['torch', 'mlx'])
def test_rounded_by_llama_cpp_s_rule(gguf, llama, tmp_path, backend):
    def kl(kind): return scored(gguf.write(llama, tmp_path/f'{kind}.gguf', 'llama', kind, True), llama, tmp_path, backend=backend).rows[1]
    fine, coarse = kl('Q8_0'), kl('Q4_0')
    assert 0 < fine['kl'] < coarse['kl']/5 and 4 < coarse['true_bpw'] < 5 < fine['true_bpw'] < 9

def test_what_is_no_gguf_of_this_model_is_refused(gguf, llama, tmp_path):
    def refused(file, match, error=ValueError):
        with pytest.raises(error, match=match): scored(str(file), llama, tmp_path)
    refused(gguf.write(llama, tmp_path/'l.gguf', 'llama', 'F16', leave='model.layers.1.mlp.up_proj'), '0 weights for model.layers.1.mlp.up_proj')
    other = Checkpoint(tiny('llama', tmp_path/'other', seed=7))
    refused(gguf.write(other, tmp_path/'o.gguf', 'llama', 'F16'), 'is not model.embed_tokens of')
    (tmp_path/'x.gguf').write_bytes(b'GGUF nothing')
    refused(tmp_path/'x.gguf', 'cannot be read as GGUF')
    refused(tmp_path/'none.gguf', 'no file', FileNotFoundError)

def test_other_tasks_refuse_a_gguf(tmp_path):
    for task, base in (('perplexity', None), ('kl', None), ('gsm8k', 'demo')):
        with pytest.raises(ValueError, match='is a GGUF file: it is scored by kl'): run_task(task, 'm.gguf', base)

def test_without_the_package_the_error_says_what_to_install(monkeypatch, llama, tmp_path):
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    with pytest.raises(ImportError, match=r"pip install 'optiq-mlx\[gguf\]'"): scored('m.gguf', llama, tmp_path)

# the protocol

def test_the_record_of_published_comparisons(tmp_path):
    text = tmp_path/'t.txt'
    text.write_text('\n'.join(p.replace('\n', ' ') for p in islice(passages('bundled', 'test', -1), 30)))
    from optiq.convert import convert
    from optiq.plan import uniform
    c = Checkpoint('demo')
    convert(c, uniform(c, '3g64'), tmp_path/'q')
    report = run_task('kl', str(tmp_path/'q'), 'demo', protocol='kld', source=str(text), cache=tmp_path)
    a, row = report.rows
    assert row['kl'] < row['kl_p99'] < row['kl_p999'] and a['kl_p999'] == 0 and a['agreement'] == 1 > row['agreement'] > .5
    assert all(row[f'{k}_se'] > 0 for k in ('kl', 'kl_p99', 'kl_p999', 'agreement', 'perplexity'))
    assert all(p['se'] > 0 for p in report.about['by_position']) and report.about['by_position'][-1]['stop'] == 512
    assert report.about['protocol'] == 'kld' and report.about['text'].endswith('× 512 tokens')
    with pytest.raises(ValueError, match='no protocol'): run_task('kl', str(tmp_path/'q'), 'demo', protocol='x')

def test_the_protocol_says_how_much_is_scored():
    def optiq(*args): return CliRunner().invoke(main, [*map(str, args)], prog_name='optiq')
    r = optiq('eval', 'demo', '--task', 'kl', '--baseline', 'demo', '--protocol', 'kld', '--n-samples', 5)
    assert r.exit_code == 1 and '--n-evaluation has no effect: the protocol says how much' in r.output
    r = optiq('eval', 'demo', '--task', 'perplexity', '--protocol', 'kld')
    assert r.exit_code == 1 and '--protocol has no effect' in r.output
