"Every kind of file in every kind of damage: the error names the file, and the place in it where there is one"
import gzip, json, os, shutil, struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from optiq.calibration import passages, _read_file
from optiq.cli import main
from optiq.evals.gsm8k import _read_questions
from optiq.report import Report
from optiq.formats import Format
from optiq.budget import make_problem
from optiq.plan import Plan, uniform
from optiq.solver import bisect
from optiq.chips import load_chip, save_chip
from optiq.latency import Speeds
from optiq.roofline import Chip
from optiq.folder import read_header, _weight_files
from optiq.models import Checkpoint
from optiq.readers import NAME, check, dumps, number, told, whole
from optiq.measure.sweep import Sweep
from optiq.material.tiny import tiny

PASSAGE = 'The river was low that summer, so the ferry waited until the evening tide before it crossed to the other side. '*3

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "One good file of each kind"
    root = tmp_path_factory.mktemp('good')
    small = dict(num_hidden_layers=2, max_window_layers=2)
    c = Checkpoint(tiny('qwen3', root/'model', shape=small))
    tiny('qwen3', root/'sharded', shape=small, max_shard=250_000)
    formats = [Format(4), Format(8)]
    header = dict(optiq='sweep', model='m', params=c.params, other_bytes=c.other_bytes, shape=[2, 8], units=[vars(u) for u in c.units],
                  fingerprint=dict(model=c.fingerprint, tokens='t', formats=['4g64', '8g64'], quantizer='minmax'))
    values = {(u.path, f): np.array([.1, .2])/f.bits for u in c.units for f in formats}
    sweep = Sweep(c.units, formats, values, header)
    sweep.save(root/'sweep.jsonl'), sweep.save(root/'sweep.json'), uniform(sweep, 4).save(root/'plan.json')
    save_chip(Chip('x', 100.), [], root/'chip.json'), Report([dict(name='a', kl=.1)], {}).save(root/'report.json')
    Speeds([], {}).save(root/'speeds.json')
    (root/'answers.jsonl').write_text('\n'.join([json.dumps(dict(question='1+1?', answer='#### 2'))]*3)+'\n')
    (root/'text.jsonl').write_text('\n'.join(json.dumps(dict(text=f'{i} {PASSAGE}')) for i in range(30))+'\n')
    (root/'text.txt').write_text('\n'.join(f'{i} {PASSAGE}' for i in range(30))+'\n')
    return root

READERS = {'sweep.jsonl': Sweep.load, 'sweep.json': Sweep.load, 'plan.json': Plan.load, 'chip.json': load_chip, 'report.json': Report.load,
           'speeds.json': Speeds.load, 'answers.jsonl': lambda p: _read_questions(p, ('question', 'answer')), 'text.jsonl': _read_file,
               'text.txt': _read_file,
           'model/config.json': lambda p: Checkpoint(p.parent), 'model/tokenizer.json': lambda p: Checkpoint(p.parent).tokenizer,
           'model/tokenizer_config.json': lambda p: Checkpoint(p.parent).tokenizer, 'model/model.safetensors': lambda p: read_header(p),
           'sharded/model.safetensors.index.json': lambda p: _weight_files(p.parent)}
PEOPLE = 'answers.jsonl', 'text.jsonl', 'text.txt' # what people bring: more is read

DAMAGE = dict(empty=b'', binary=bytes(range(256))*4, latin1=lambda b: b[:-3]+'é'.encode('latin-1')+b[-3:], bom=lambda b: b'\xef\xbb\xbf'+b,
              cut=lambda b: b[:len(b)//2], number=b'3', null=b'null', list=b'[]', deep=b'['*100_000+b']'*100_000,
              utf16=lambda b: b.decode().encode('utf-16'), garbage=lambda b: b+b'}}\n', gzip=gzip.compress(b'not this')[:-6],
              folder=Path.mkdir, pipe=os.mkfifo, loop=lambda p: p.symlink_to(p), dangling=lambda p: p.symlink_to('nothing'))

@pytest.fixture
def copied(good, tmp_path):
    def copy(name):
        top = Path(name).parts[0]
        (shutil.copytree if (good/top).is_dir() else shutil.copy)(good/top, tmp_path/top)
        return tmp_path/name
    return copy

@pytest.mark.parametrize('name', READERS)
def test_good_files_are_read(good, name): assert READERS[name](good/name)

@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('name', READERS)
def test_damage_is_told_with_the_file(copied, name, damage):
    file, how = copied(name), DAMAGE[damage]
    if name.endswith('safetensors') and damage == 'utf16': return # it is no text
    if damage in ('folder', 'pipe', 'loop', 'dangling'):
        file.unlink()
        how(file)
    else: file.write_bytes(how(file.read_bytes()) if callable(how) else how)
    taken = name in PEOPLE and (damage == 'bom' or damage == 'utf16' and 'text' in name) or name == 'text.txt' and damage in ('garbage',
        'cut', 'number', 'null', 'list', 'deep', 'empty')
    taken |= name == 'text.jsonl' and damage in ('empty', 'list') # nothing to read, which `passages` tells
    if taken:
        READERS[name](file)
        return
    with pytest.raises((ValueError, OSError)) as e: READERS[name](file)
    assert file.name in str(e.value) and '\n' not in str(e.value)
    assert 'codec' not in str(e.value) and 'object has no' not in str(e.value)

BAD = dict(text='x', none=None, negative=-1, half=.5, nan=float('nan'), true=True, empty=[], object={}, huge=10**40)
FIELDS = [('sweep', k) for k in ('params', 'other_bytes', 'units', 'fingerprint', 'units/0/shape', 'units/0/path', 'fingerprint/formats')]
FIELDS += [('plan', k) for k in ('params', 'other_bytes', 'units', 'units/0/shape', 'units/0/format', 'units/0/kl', 'solver')]
FIELDS += [('config', k) for k in ('hidden_size', 'num_hidden_layers', 'vocab_size', 'num_attention_heads')]
FIELDS += [('index', 'weight_map'), ('chip', 'chip/bandwidth'), ('report', 'rows')]
FINE = {('plan', 'units/0/kl', 'none'), ('plan', 'units/0/kl', 'half'), ('chip', 'chip/bandwidth', 'half'), ('report', 'rows', 'empty'),
    ('plan', 'solver', 'object'),
        ('plan', 'units/0/path', 'text'), ('index', 'weight_map', 'object')}
FILES = dict(sweep='sweep.json', plan='plan.json', config='model/config.json', index='sharded/model.safetensors.index.json',
    chip='chip.json', report='report.json')

@pytest.mark.parametrize('bad', [*BAD, 'gone'])
@pytest.mark.parametrize('kind,place', FIELDS)
def test_fields_have_a_form(copied, kind, place, bad):
    file = copied(FILES[kind])
    d = at = json.loads(file.read_text())
    *path, last = [int(k) if k.isdigit() else k for k in place.split('/')]
    for k in path: at = at[k]
    if bad == 'gone': del at[last]
    else: at[last] = BAD[bad]
    file.write_text(json.dumps(d))
    if (kind, place, bad) in FINE or (kind, place, bad) == ('sweep', 'units/0/path', 'text'): return
    with pytest.raises((ValueError, OSError)) as e:
        if kind == 'config': Checkpoint(file.parent).load()
        else: READERS[FILES[kind]](file)
    assert file.name in str(e.value) or kind == 'config' and 'model' in str(e.value)

# ---- safetensors

def rewritten(file, change):
    data = file.read_bytes()
    n = struct.unpack('<Q', data[:8])[0]
    head = change(json.loads(data[8:8+n]))
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    file.write_bytes(struct.pack('<Q', len(head))+head+data[8+n:])

A, B = 'model.layers.0.self_attn.k_proj.weight', 'model.layers.1.self_attn.k_proj.weight'
def entry(**new): return lambda h: h | {A: h[A] | {k: v(h[A][k]) if callable(v) else v for k, v in new.items()}}

HEADS = dict(overlap=lambda h: h | {A: h[A] | dict(data_offsets=h[B]['data_offsets'])}, floats=entry(shape=lambda s: [float(x) for x in s]),
             negative=entry(shape=lambda s: [-x for x in s]), dtype=entry(dtype='X9'), none=entry(dtype=None),
                 larger=entry(shape=lambda s: [2*s[0], s[1]]),
             short=entry(data_offsets=lambda o: [o[0], o[1]-64]), one=entry(data_offsets=[0]), text=entry(data_offsets=['0', '9']),
                 list=lambda h: h | {A: [1]},
             metadata=lambda h: h | {'__metadata__': [1]}, empty=lambda h: {}, lacking=lambda h: h | {A: dict(dtype='BF16')},
             twice=lambda h: (json.dumps(h)[:-1]+', '+json.dumps({A: h[B]})[1:]).encode(), gone=lambda h: {k: v for k, v in h.items() if k != A})

@pytest.mark.parametrize('how', HEADS)
def test_headers(copied, how):
    file = copied('model/model.safetensors')
    rewritten(file, HEADS[how])
    with pytest.raises(ValueError, match='model.safetensors'): read_header(file)

def test_integer_weights(copied):
    file = copied('model/model.safetensors')
    rewritten(file, entry(dtype='I16'))
    with pytest.raises(ValueError, match='k_proj.weight .*int16'): Checkpoint(file.parent)

@pytest.mark.parametrize('backend', ['torch', 'mlx', 'stream'])
@pytest.mark.parametrize('name', ['model.norm.weight', 'model.layers.1.input_layernorm.weight', A])
def test_nan_is_found_where_weights_are_read(copied, backend, name):
    from optiq.backends.open import open_backend
    file = copied('model/model.safetensors')
    data, (start, _) = bytearray(file.read_bytes()), read_header(file)[name]['data_offsets']
    data[start+4:start+6] = struct.pack('<H', 0x7fc0)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f'model.safetensors: {name.removesuffix(".weight")}.* NaN'):
        b = open_backend(Checkpoint(file.parent), backend)
        b.logits(np.arange(6)[None])
        for i in range(b.n_blocks): b.block(i)

@pytest.mark.parametrize('backend', ['torch', 'mlx', 'stream'])
@pytest.mark.parametrize('ids', [[0, 10**6], [0, -1]])
def test_ids_beyond_the_embedding(good, backend, ids):
    from optiq.backends.open import open_backend
    b = open_backend(Checkpoint(good/'model'), backend)
    for f in (b.logits, b.embed):
        with pytest.raises(ValueError, match='is not one of them'): f(np.array([ids]))

# ---- which files are the model's

def test_a_stale_index_beside_a_whole_file(good, copied):
    folder = copied('model')
    shutil.copy(good/'sharded'/'model.safetensors.index.json', folder)
    assert [f.name for f in _weight_files(folder)] == ['model.safetensors'] and Checkpoint(folder).params == Checkpoint(good/'model').params

@pytest.mark.parametrize('folder', ['model', 'sharded'])
def test_stray_weights(copied, folder):
    folder = copied(folder)
    shutil.copy(_weight_files(folder)[0], folder/'model-extra.safetensors')
    with pytest.raises(ValueError, match='model-extra.safetensors .* take it out'): _weight_files(folder)
    (folder/'model-extra.safetensors').rename(folder/'adapter_config.json') # transformers would look elsewhere for the model
    with pytest.raises(ValueError, match='adapter_config.json .* take it out'): _weight_files(folder)

def test_a_shard_that_is_another(copied):
    folder = copied('sharded')
    one, two, *_ = _weight_files(folder)
    shutil.copy(two, one)
    with pytest.raises(ValueError, match=f'{one.name} has no'): _weight_files(folder)

@pytest.mark.parametrize('to', ['../x.safetensors', '/etc/passwd', '', '.', 3, None])
def test_an_index_names_files_beside_it(copied, to):
    file = copied('sharded/model.safetensors.index.json')
    d = json.loads(file.read_text())
    d['weight_map'][A] = to
    file.write_text(json.dumps(d))
    with pytest.raises(ValueError, match='index.json: the file of'): _weight_files(file.parent)

def test_whisper_in_weights_safetensors(tmp_path):
    pytest.importorskip('mlx_audio')
    folder = tiny('whisper', tmp_path/'w', shape=dict(max_source_positions=100))
    (folder/'model.safetensors').rename(folder/'weights.safetensors')
    assert Checkpoint(folder).model_type == 'audio'
    shutil.copy(folder/'weights.safetensors', folder/'more.safetensors')
    with pytest.raises(ValueError, match='more.safetensors is not part'): Checkpoint(folder)

# ---- sweeps

def lines(p): return p.read_text().split('\n')[:-1]

@pytest.mark.parametrize('new', [dict(kl=['a', 'b']), dict(kl=[]), dict(kl=[.1]), dict(kl=[-1., 2.]), dict(kl=[1e300]*2),
    dict(kl=[float('nan')]*2), dict(kl=.1), dict(unit='x'), dict(unit=None),
                                 dict(format='9g9'), dict(format=3), dict(format='3g64'), dict(start=7), dict(start=-1), dict(start='0')])
@pytest.mark.parametrize('name', ['sweep.json', 'sweep.jsonl'])
def test_records_of_a_sweep(copied, name, new):
    file = copied(name)
    rows = lines(file)
    end = ',' if rows[3].endswith(',') else ''
    rows[3] = json.dumps(json.loads(rows[3].removesuffix(',')) | new)+end
    file.write_text('\n'.join(rows)+'\n')
    with pytest.raises(ValueError, match=f'{name}(, (line 4|record 3)| is not finished| is (no|not a) sweep)'): Sweep.load(file)

def test_kinds_are_told_by_content(good, tmp_path):
    for a, b in (('sweep.json', 'x.jsonl'), ('sweep.jsonl', 'x.json')):
        shutil.copy(good/a, tmp_path/b)
        assert Sweep.load(tmp_path/b).header == Sweep.load(good/a).header
    for f, other in ((Sweep.load, 'plan.json'), (Plan.load, 'sweep.json'), (Report.load, 'chip.json')):
        with pytest.raises(ValueError, match=f'{other}.* is not a .*but a {other.split(".")[0]}'): f(good/other)

def test_sweep_into_a_json_file(good, tmp_path):
    argv = ['sweep', str(good/'model'), '-o', str(tmp_path/'x.json'), '--bits', '4', '--samples', '2', '--seq-len', '16', '--rounding', 'minmax']
    for _ in range(2): assert (r := CliRunner().invoke(main, argv)).exit_code == 0, r.output # and again, from what is there
    assert len(Sweep.load(tmp_path/'x.json').units) == 15

def test_changed_params(copied):
    for name, f in (('plan.json', Plan.load), ('sweep.json', Sweep.load)):
        file = copied(name)
        d = json.loads(file.read_text())
        file.write_text(json.dumps(d | dict(params=2*d['params'])))
        with pytest.raises(ValueError, match=f'{name}.* params'): f(file)

def test_the_solver_ends_with_any_scale(good):
    s = Sweep.load(good/'sweep.json')
    for scale in (1e-300, 1e300):
        table = {k: v*scale for k, v in s.values.items()}
        from optiq.budget import budgets_of
        assert len(bisect(make_problem(s, table, s.formats, budgets_of(s, target_bpw=5)))) == 1

# ---- text that people have

TEXTS = {'a.json': json.dumps([dict(text=PASSAGE+str(i)) for i in range(40)]),
    'a.JSONL': '\n'.join(json.dumps(dict(text=PASSAGE+str(i))) for i in range(40)),
         'a.ndjson': '\n'.join(json.dumps(dict(question=PASSAGE, answer=str(i))) for i in range(40)),
             'a.data': '\n'.join(json.dumps(dict(text=PASSAGE+str(i))) for i in range(40)),
         'strings.jsonl': '\n'.join(json.dumps(PASSAGE+str(i)) for i in range(40)), 'lists.jsonl': '\n'.join(json.dumps(dict(text=[PASSAGE,
             str(i)])) for i in range(40)),
         'nulls.jsonl': '\n'.join(json.dumps(dict(text=[PASSAGE+str(i), None][i%2])) for i in range(80)),
             'one.txt': ' '.join(f'{i} {PASSAGE}' for i in range(60)),
         'wrapped.txt': '\n\n'.join('\n'.join(f'{i} {PASSAGE}'[k:k+72] for k in range(0, 340, 72)) for i in range(40)),
         'seps.jsonl': '\n'.join(json.dumps(dict(text=f'{i}\u2028{PASSAGE}\x85'), ensure_ascii=False) for i in range(40)),
             'seps.txt': '\n'.join(f'{i}\u2028{PASSAGE}' for i in range(40))}

@pytest.mark.parametrize('code', ['utf-8', 'utf-8-sig', 'utf-16', 'gzip'])
@pytest.mark.parametrize('name', TEXTS)
def test_texts_are_read(tmp_path, name, code):
    file = tmp_path/name
    file.write_bytes(gzip.compress(TEXTS[name].encode()) if code == 'gzip' else TEXTS[name].encode(code))
    for split in ('train', 'test'): assert all('{' not in p and 'river' in p for p in passages(file, split))
    if 'seps' in name: assert len(_read_file(file)) == 40

@pytest.mark.parametrize('row', ['{"text": 3}', '[1]', '3', '{}', '{"content": "x"}', '{"text": "x', '{"text": NaN}', '{"question": "x"}',
    r'{"text": "\ud800"}'])
def test_records_that_hold_no_text(good, tmp_path, row):
    file = tmp_path/'t.jsonl'
    file.write_text((good/'text.jsonl').read_text()+row+'\n')
    with pytest.raises(ValueError, match='t.jsonl, line 31'): _read_file(file)

def test_parquet(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table(dict(text=[PASSAGE+str(i) for i in range(40)]+[None])), tmp_path/'t.parquet')
    assert len(passages(tmp_path/'t.parquet', 'all')) == 40
    for data in (b'', b'PAR1'+bytes(99)+b'PAR1', PASSAGE.encode()):
        (tmp_path/'t.parquet').write_bytes(data)
        with pytest.raises(ValueError, match='t.parquet'): _read_file(tmp_path/'t.parquet')

# ---- numbers of options, and what is printed

def all_numbers():
    import click
    return [(name, p.opts[0], getattr(p.type, 'none', False)) for name, c in main.commands.items() for p in c.params
            if isinstance(p, click.Option) and p.type.name in ('integer', 'float') and not p.is_flag]

@pytest.mark.parametrize('value', ['nan', 'inf', '1e400', '-1', '0', '9'*30, 'x', ''])
def test_numbers_of_options(value):
    assert len(all_numbers()) > 25
    for name, option, none in all_numbers():
        if none and value == '0': continue # it says so
        r = CliRunner().invoke(main, [name, *['demo']*(name not in ('doctor',)), option, value])
        assert r.exit_code == 2 and option in r.output, (name, option, r.output)

@pytest.mark.parametrize('targets', ['4:8:1e-6', '3:8:1e-9', 'nan', '1e400', '-1', '3:8', '8:3:1', '3:8:0', '0'])
def test_targets(good, targets):
    r = CliRunner().invoke(main, ['pareto', str(good/'sweep.json'), '--targets', targets])
    assert r.exit_code == 1 and '--targets' in r.output

def test_a_format_of_the_cache_is_refused_before_the_sweep(good):
    for command in (['sweep', '-o', 'x'], ['convert'], ['pareto'], ['latency']):
        r = CliRunner().invoke(main, [command[0], str(good/'model'), *command[1:], '--formats', 'tq4'])
        assert r.exit_code == 1 and 'tq4 is a format of the KV cache' in r.output and not Path('x').exists()

def test_options_without_effect(good, tmp_path):
    idle = ['--polish dwq', '--verify', '--skip-baselines', '--target-bpw 4', '--target-memory 9', '--target-tps 9', '--chip M1']
    for words in [f'convert MODEL --kv --target-size 9 {w}' for w in idle]+['convert MODEL --kv-candidate-bits 4',
        'pareto SWEEP --rounding gptq']:
        r = CliRunner().invoke(main, words.replace('MODEL', str(good/'model')).replace('SWEEP', str(good/'sweep.json')).split()+['-o',
            str(tmp_path/'out')])
        assert r.exit_code == 1 and r.output.count('\n') == 1 and ('kv' in r.output or 'was measured with' in r.output), (words, r.output)

def test_a_chip_without_a_speed(good):
    r = CliRunner().invoke(main, ['convert', str(good/'model'), '--chip', 'M3 Max'])
    assert r.exit_code == 1 and '--target-tps' in r.output

def test_unknown_is_null(): assert dumps(dict(a=float('nan'), b=[float('-inf'), 1.5], c=(1,))) == '{"a": null, "b": [null, 1.5], "c": [1]}'

def test_errors_of_libraries():
    for f in (lambda: {}['x'], lambda: 1/0, lambda: None.x, lambda: [][1]):
        with pytest.raises(Exception) as e: f()
        assert 'test_readers.py, line' in told(e.value)
    assert told(ValueError('two\nlines')) == 'two lines'

def test_forms():
    for x, form in ((True, whole()), (1., whole()), (float('inf'), number()), (True, number()), ('a\nb', NAME), ('', NAME), (10**400, number())):
        with pytest.raises(ValueError, match='here is .*should be'): check(x, form, 'here')

def test_logits_that_are_no_numbers(copied):
    from optiq.backends.open import open_backend
    from optiq.evals.perplexity import evaluate
    from optiq.sensitivity import kl_sweep
    from safetensors.torch import load_file, save_file
    file = copied('model/model.safetensors')
    arrays = load_file(file)
    arrays['model.norm.weight'].fill_(3e38) # finite, and the product is not
    save_file(arrays, file)
    c, tokens = Checkpoint(file.parent), np.arange(16).reshape(2, 8)
    for f in (lambda: open_backend(c, 'torch'), lambda: evaluate(open_backend(c, 'mlx'), tokens),
              lambda: kl_sweep(open_backend(c, 'mlx'), tokens, [4], progress=False)):
        with pytest.raises(ValueError, match='NaN|not numbers'): f()
