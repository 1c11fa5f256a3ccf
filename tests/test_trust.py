"""Nobody's code runs, no link leaves the model, and what others quantized is told, at every command

A canary is a Python file in a checkpoint that leaves a mark when it is run.
"""
import json, os, shutil
from pathlib import Path
from types import SimpleNamespace
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from click.testing import CliRunner

from optiq.families.audio import load_speech
from optiq.cli import main
from optiq.convert import convert
from optiq.plan import uniform
from optiq.folder import _demo, check_untrusted
from optiq.models import Checkpoint
from optiq.material.tiny import tiny

COMMANDS = dict(
    convert=['convert', '{m}', '--target-bpw', '5', '-o', '{out}'], sweep=['sweep', '{m}', '-o', '{out}'],
    pareto=['pareto', '{m}', '-o', '{out}'], eval=['eval', '{m}', '--task', 'perplexity'],
    baseline=['eval', 'demo', '--task', 'kl', '--baseline', '{m}'], wer=['eval', '{m}', '--task', 'wer'],
    benchmark=['benchmark', '{m}'], verify=['verify', '{m}'], reference=['verify', 'demo', '--reference', '{m}'],
    latency=['latency', '{m}', '--chip', 'M3 Max'], kv=['kv-cache', '{m}', '-o', '{out}'], serve=['serve', '{m}'],
    draft=['serve', 'demo', '--draft-model', '{m}'], also=['serve', 'demo', '--also', '{m}'],
    fit=['fit', '{m}'], chat=['chat', '{m}'], compare=['compare', '{m}', 'demo'], other=['compare', 'demo', '{m}'])
COMMANDS |= {f'demo {n}': ['demo', n, '--model', '{m}', '-o', '{out}'] for n in ('llm', 'vlm', 'audio', 'pareto', 'hardware', 'kv-cache',
    'combined')}

@pytest.fixture(scope='module', params=['qwen3', 'qwen3_vl', 'qwen3_asr'])
def model(request, tmp_path_factory): return tiny(request.param, tmp_path_factory.mktemp(request.param)/'m')

@pytest.fixture(scope='module')
def llama(tmp_path_factory): return tiny('llama', tmp_path_factory.mktemp('llama')/'m')

def changed(folder: Path, file: str, **entries):
    "More entries in a JSON file, which may not be there yet"
    path = folder/file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | entries))

def planted(source, out, file, **entries) -> Path:
    "A copy of a checkpoint that names a canary"
    shutil.copytree(source, out)
    (out/'evil.py').write_text(f'import pathlib; pathlib.Path({str(out/"mark")!r}).touch()\n')
    changed(out, file, **entries)
    return out

def refused(command, folder, out) -> str:
    "The one line with which a command refuses a model"
    r = CliRunner().invoke(main, [a.format(m=folder, out=out) for a in COMMANDS[command]])
    lines = [line for line in r.stderr.splitlines() if line.strip()]
    assert r.exit_code == 1 and not out.exists() and not (folder/'mark').exists(), r.output
    if command == 'verify' and not lines: return r.stdout # its first check says it
    assert len(lines) == 1 and lines[0].startswith('error: '), r.stderr
    return lines[0]

MAPS = {'config.json': 'AutoConfig', 'tokenizer_config.json': 'AutoTokenizer', 'processor_config.json': 'AutoProcessor',
        'preprocessor_config.json': 'AutoImageProcessor', 'video_preprocessor_config.json': 'AutoVideoProcessor',
        'feature_extractor_config.json': 'AutoFeatureExtractor', 'text_encoder/config.json': 'AutoModel'}
CANARIES = [('config.json', dict(model_file='evil.py')), ('config.json', dict(_attn_implementation='evil/kernel'))] + [(f,
    dict(auto_map={k: 'evil.Thing'})) for f, k in MAPS.items()]

@pytest.mark.parametrize('file, entries', CANARIES)
def test_code_is_refused_before_any_loader(model, tmp_path, file, entries):
    folder = planted(model, tmp_path/'m', file, **entries)
    for opens in (Checkpoint, load_speech):
        with pytest.raises(ValueError) as e: opens(folder)
        assert str(folder/file) in str(e.value) and next(iter(entries)) in str(e.value) and '\n' not in str(e.value)
    assert not (folder/'mark').exists()

@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_the_gate(model, tmp_path, command):
    for i, (file, entries) in enumerate((CANARIES[0], CANARIES[3])):
        line = refused(command, planted(model, tmp_path/str(i), file, **entries), tmp_path/'out')
        assert file in line and next(iter(entries)) in line

@pytest.mark.parametrize('changes', [dict(vision_config=dict(depth=1)), dict(model_type='hy_v4'), dict(model_type='os.path')])
def test_a_text_model_for_another_loader_is_refused(llama, tmp_path, changes):
    "Made a vision model, or of a type that only mlx-vlm has, or of none that a loader has"
    folder = planted(llama, tmp_path/'m', 'config.json', model_file='evil.py', **changes)
    for kind in ('auto', 'llm', 'vlm'):
        with pytest.raises(ValueError, match='model_file'): Checkpoint(folder, model_type=kind)
    assert not (folder/'mark').exists()

@pytest.mark.parametrize('text', [
    '{"\\u0061uto_map": {"AutoTokenizer": "evil.T"}}', '\ufeff{"auto_map": "evil.T"}', '{"auto_map": null, "a": [{"auto_map": ["evil.T"]}]}'])
def test_no_spelling_hides_it(llama, tmp_path, text):
    folder = planted(llama, tmp_path/'m', 'config.json')
    (folder/'tokenizer_config.json').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match='auto_map'): check_untrusted(folder)
    (folder/'tokenizer_config.json').write_bytes(b'{"name": "\xe9", "auto_map": "evil.T"}') # Latin-1, which a locale may read
    with pytest.raises(ValueError, match='auto_map'): check_untrusted(folder)

def test_words_of_a_vocabulary_are_no_code(llama, tmp_path):
    folder = planted(llama, tmp_path/'m', 'vocab.json', auto_map=17, model_file=18)
    changed(folder, 'config.json', model_file=None, auto_map={}, _attn_implementation='sdpa')
    (folder/'notes.json').write_text('{"auto_map": ')
    assert Checkpoint(folder).params

CODE = dict(qwen3='from mlx_lm.models.qwen3 import *', qwen3_vl='from mlx_vlm.models.qwen3_vl import *')
TOKENIZER = """from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).touch()
class Mine(PreTrainedTokenizerFast): pass
"""

def test_trusted_code_runs_and_is_taken_along(model, tmp_path):
    "Where the loader knows how; the output opens like its source"
    kind = json.loads((model/'config.json').read_text())['model_type']
    folder = planted(model, tmp_path/'m', 'tokenizer_config.json', auto_map=dict(AutoTokenizer=['tokenization_mine.Mine', None]))
    (folder/'tokenization_mine.py').write_text(TOKENIZER.format(mark=str(tmp_path/'tokenized')))
    if kind in CODE:
        changed(folder, 'config.json', model_file='mine.py')
        (folder/'mine.py').write_text((folder/'evil.py').read_text()+CODE[kind])
    c = Checkpoint(folder, trust_remote_code=True)
    assert (folder/'mark').exists() == (kind in CODE)
    if kind == 'qwen3_asr': load_speech(c)
    assert type(c.tokenizer).__name__ == 'Mine' and (tmp_path/'tokenized').exists()
    saved = convert(c, uniform(c, 4), tmp_path/'out')
    assert saved.trust_remote_code and type(saved.tokenizer).__name__ == 'Mine'
    with pytest.raises(ValueError, match='auto_map|model_file'): Checkpoint(tmp_path/'out')

def test_a_flag_of_the_command_trusts(llama, tmp_path):
    folder = planted(llama, tmp_path/'m', 'config.json', model_file='mine.py')
    (folder/'mine.py').write_text((folder/'evil.py').read_text()+'from mlx_lm.models.llama import *')
    r = CliRunner().invoke(main, ['latency', str(folder), '--chip', 'M3 Max', '--trust-remote-code'])
    assert r.exit_code == 0 and (folder/'mark').exists(), r.output

def test_all_that_a_loader_needs_is_copied(tmp_path):
    from fnmatch import fnmatch
    from optiq.folder import _HUB_FILES
    source = shutil.copytree(_demo(), tmp_path/'m')
    for name in ('tokenization_mine.py', 'mine.tiktoken', 'chat_template.jinja', 'additional_chat_templates/rag.jinja',
                 'tokenizer.model', 'vocab.bpe', 'merges.txt', 'special.jsonl', 'spm.vocab'):
        (source/name).parent.mkdir(exist_ok=True)
        (source/name).write_text(f'of {name}')
        assert any(fnmatch(name, pattern) for pattern in _HUB_FILES) # so the Hub's files are the same
    (source/'keys.pem').write_text('no loader needs it')
    c = Checkpoint(source)
    convert(c, uniform(c, 4), tmp_path/'out')
    files = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
    assert files(source)-files(tmp_path/'out') == {'keys.pem'}
    assert (tmp_path/'out'/'additional_chat_templates'/'rag.jinja').read_text() == 'of additional_chat_templates/rag.jinja'
    assert set(Checkpoint(tmp_path/'out').tokenizer.chat_template) == {'default', 'rag'}

ESCAPE = '{{ cycler.__init__.__globals__.os.system("touch MARK") }}'
RENDERERS = ['phi3_v.processing_phi3_v.Phi3VProcessor', 'kimi_vl.processing_kimi_vl.KimiVLProcessor',
             'molmo.processing_molmo.MolmoProcessor', 'molmo2.processing.Molmo2Processor']

@pytest.mark.parametrize('where', RENDERERS)
def test_templates_of_vision_models_run_in_the_sandbox(where, tmp_path):
    from importlib import import_module
    from optiq.families.vision import _question_text
    module, name = where.rsplit('.', 1)
    renders = getattr(import_module(f'mlx_vlm.models.{module}'), name).apply_chat_template
    class Processor:
        chat_template, tokenizer, image_token = ESCAPE.replace('MARK', str(tmp_path/'mark')), None, '<image>'
        def apply_chat_template(self, *args, **options): return renders(self, *args, **options)
    c = SimpleNamespace(name='m', config=dict(model_type='qwen3_vl'))
    with pytest.raises(ValueError, match='reaches for Python') as e: _question_text(c, Processor(), 'What?')
    assert not (tmp_path/'mark').exists() and '\n' not in str(e.value)
    Processor.chat_template = '{% for m in messages %}{{ m.role }}{% endfor %}'
    assert _question_text(c, Processor(), 'What?') == 'user'

def test_templates_of_text_models_run_in_the_sandbox(tmp_path):
    from jinja2.exceptions import SecurityError
    folder = shutil.copytree(_demo(), tmp_path/'m')
    (folder/'chat_template.jinja').write_text(ESCAPE.replace('MARK', str(tmp_path/'mark')))
    with pytest.raises(SecurityError): Checkpoint(folder).tokenizer.apply_chat_template([dict(role='user', content='Hi')])
    assert not (tmp_path/'mark').exists()

@pytest.mark.parametrize('command', COMMANDS)
def test_links_out_of_the_model_are_refused(command, tmp_path):
    (tmp_path/'secret.txt').write_text('a key')
    for name, target in (('keys.txt', '../secret.txt'), ('additional_chat_templates', '..'), ('tokenizer.model', 'hop')):
        folder = shutil.copytree(_demo(), tmp_path/'m')
        (folder/name).symlink_to(target)
        if target == 'hop': (folder/'hop').symlink_to(tmp_path/'nowhere'/'yet')
        line = refused(command, folder, tmp_path/'out')
        assert 'outside of the model' in line and 'is a link' in line
        shutil.rmtree(folder)

def test_links_inside_are_followed(tmp_path):
    "A link to another file of the model, and the Hub's cache, which is made of links"
    hub = tmp_path/'models--a--b'
    folder, blobs = hub/'snapshots'/'0123', hub/'blobs'
    blobs.mkdir(parents=True), folder.mkdir(parents=True)
    for f in _demo().iterdir():
        if f.is_dir(): continue
        shutil.copy(f, blobs/f.name)
        (folder/f.name).symlink_to(f'../../blobs/{f.name}')
    (folder/'again.txt').symlink_to('tokenizer.json')
    (tmp_path/'short').symlink_to(folder) # the folder itself is named by the user
    assert Checkpoint(tmp_path/'short').fingerprint == Checkpoint('demo').fingerprint
    (folder/'other.txt').symlink_to('../../../models--c--d/blobs/0')
    with pytest.raises(ValueError, match='outside of the model'): Checkpoint(folder)

def test_a_name_that_others_read_as_a_pattern(model, tmp_path):
    "mlx-lm and mlx-vlm find weights by a pattern; with these names it fits nothing, or the folder beside"
    want = Checkpoint(model).load(plain=True).parameters()
    shutil.copytree(model, tmp_path/'a beside')
    (tmp_path/'a beside'/'model.safetensors').write_bytes(b'')
    for name in ('a*', 'a [1]', 'a ?eside'):
        c = Checkpoint(shutil.copytree(model, tmp_path/name))
        got = c.load(plain=True).parameters()
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(tree_flatten(got), tree_flatten(want))) and c.tokenizer
    odd = tmp_path/os.fsdecode(b'\xe9')
    shutil.copytree(model, odd)
    with pytest.raises(ValueError, match='is not UTF-8, so MLX cannot read it'): Checkpoint(odd)
    (tmp_path/'short').symlink_to(odd)
    assert Checkpoint(tmp_path/'short').load()

METHODS = ['gptq', 'awq', 'bitsandbytes', 'fp8', 'mxfp4', 'compressed-tensors', 'hqq', 'aqlm', 'torchao', 'bitnet', 'modelopt']

@pytest.mark.parametrize('method', METHODS)
def test_what_others_quantized_is_told(llama, tmp_path, method):
    folder = shutil.copytree(llama, tmp_path/'m')
    for place in (dict(), 'text_config'):
        said = dict(quantization_config=dict(quant_method=method, bits=4))
        changed(folder, 'config.json', **({place: said, 'quantization_config': None} if place else said))
        with pytest.raises(ValueError, match=f'another library .{method}') as e: Checkpoint(folder)
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_tells_what_others_quantized(llama, tmp_path, command):
    folder = shutil.copytree(llama, tmp_path/'m')
    changed(folder, 'config.json', quantization_config=dict(quant_method='gptq', bits=4))
    assert 'gptq' in refused(command, folder, tmp_path/'out')

@pytest.mark.parametrize('file', ['hf_quant_config.json', 'quantize_config.json', 'quant_config.json'])
def test_a_file_beside_the_config_tells_it_too(llama, tmp_path, file):
    folder = shutil.copytree(llama, tmp_path/'m')
    changed(folder, file, bits=4)
    with pytest.raises(ValueError, match=file): Checkpoint(folder)

@pytest.mark.parametrize('backend', ['torch', 'mlx'])
def test_null_says_nothing(llama, tmp_path, backend):
    from optiq.backends.open import open_backend
    import numpy as np
    folder = shutil.copytree(llama, tmp_path/'m')
    changed(folder, 'config.json', quantization=None, quantization_config=None)
    c = Checkpoint(folder)
    b, plain = open_backend(c, backend), open_backend(Checkpoint(llama), backend)
    ids = np.arange(8)[None]
    assert (b.numpy(b.logits(ids)) == plain.numpy(plain.logits(ids))).all()
    if backend == 'mlx': assert convert(c, uniform(c, 4), tmp_path/'out').formats
