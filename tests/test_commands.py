"""Every command of README and site works as it stands

All are extracted from the pages. Those of optiq that need no network, no other model and no GPU are run with the demo
model, each document in a folder of its own, in order. The others are parsed, so that every option exists. OPTIQ_SLOW=1
runs them by the shell with their own defaults instead of small ones: some minutes, see CONTRIBUTING.
"""
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from commands import commands_of, documents, root, split

ELSEWHERE = { # why a command is parsed only
    r'\b(Qwen|mlx-community|HuggingFaceTB|openai|meta-llama|google)/': 'needs a model from the Hub',
    r'\bsmollm2\b|\bwhisper\b': 'needs a model that is too large for the repository',
    r'wikitext2|\S+\.parquet|\bmy[-./\w]*': 'needs a text or a model of the reader',
    r'^optiq serve\b|^mlx_lm\.server': 'does not end',
    r'^optiq demo\b|--task (ai2d|wer|harness)': 'takes minutes, and is run as a notebook or by its own tests',
    r'--calibrate|--measure|\b--speed\b': 'measures speed, which says nothing while tests run'}
FOUND = [(name, c) for name, text in documents().items() for c in dict.fromkeys(commands_of(text))]
OPTIQ = [(name, c) for name, c in FOUND if split(c)[1][:1] == ['optiq']]
HERE = [(name, c) for name, c in OPTIQ if not any(re.search(p, c) for p in ELSEWHERE)]

def test_something_was_found():
    assert len(HERE) >= 20 and len(OPTIQ) > len(HERE) and len(FOUND) > len(OPTIQ)
    assert commands_of('```sh\na b \\\n  c # d\n# e\n$ f\neval "$(g)"\nh | source\n```\n`x`\n```python\ni\n```') == ['a b c', 'f', 'g', 'h']

def parsed(words: list):
    "Click's reading of a command; raises where an option or a value is not known"
    from optiq.cli import main
    group = main.make_context('optiq', words[:1], resilient_parsing=True)
    if not words: return group
    name, command, _ = main.resolve_command(group, words[:1])
    return command.make_context(name, words[1:], parent=group)

@pytest.mark.parametrize('document, command', OPTIQ)
def test_options_exist(document, command): parsed(split(command)[1][1:])

def test_an_unknown_option_is_found():
    import click
    with pytest.raises(click.NoSuchOption): parsed(['convert', 'demo', '--target-bwp', '4'])

def test_examples_of_the_help_are_parsed():
    from optiq.cli import main
    lines = [line.strip() for c in main.commands.values() for line in (c.help or '').splitlines() if line.strip().startswith('optiq ')]
    assert len(lines) >= len(main.commands)
    for line in lines: parsed(split(line)[1][1:])

@pytest.mark.parametrize('document', documents())
def test_inline_commands_exist(document):
    from optiq.cli import main
    for inline in re.findall(r'`optiq ([^`\n]+)`', documents()[document]):
        words = inline.split()
        if words[0].startswith('-') or words[0] in ('COMMAND', '…'): continue
        assert words[0] in main.commands, f'{document}: optiq {inline}'
        known = {o for p in main.commands[words[0]].params for o in [*p.opts, *p.secondary_opts]} | {'--help', '-h'}
        assert {w for w in words if w.startswith('--')} <= known, f'{document}: optiq {inline}'

@pytest.mark.parametrize('document, command', [f for f in FOUND if f not in OPTIQ])
def test_other_commands(document, command):
    "Targets of the Makefile exist, tools are installed, files are there"
    env, words = split(command)
    if words[0] == 'make':
        targets = re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(), re.M)
        assert words[1] in targets, command
    elif words[0] in ('pip', 'pre-commit', 'git', 'cd', 'source', 'uv', 'python3', 'mkdir', 'cp'): pass
    else: assert (Path(sys.executable).parent/words[0]).exists() or (root/words[0]).exists(), command
    for w in words[1:]:
        file = w.split('=')[-1]
        if re.match(r'(nbs|tests|bench|tools|models)/', file): assert (root/file).exists(), command

def results(folder) -> dict:
    env = os.environ | dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'), HF_HUB_OFFLINE='1')
    if not os.environ.get('OPTIQ_SLOW'):
        subprocess.run([sys.executable, root/'tests/commands.py', folder], input=json.dumps(HERE), text=True, check=True, env=env)
        return json.loads((folder/'found.json').read_text())
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    runs = []
    for document, command in HERE:
        (folder/document).mkdir(parents=True, exist_ok=True)
        r = subprocess.run(['bash', '-c', command], cwd=folder/document, env=env, text=True, capture_output=True)
        runs.append(dict(document=document, command=command, code=r.returncode, output=(r.stdout+r.stderr)[-1500:]))
    return dict(runs=runs, wrong=[])

@pytest.fixture(scope='module')
def ran(tmp_path_factory): return results(tmp_path_factory.mktemp('commands'))

def test_every_command_runs(ran):
    failed = [f'{r["document"]}: {r["command"]}\n{r["output"]}' for r in ran['runs'] if r['code']]
    assert not failed, '\n\n'.join(failed)
    assert len(ran['runs']) == len(HERE)

def test_annotations_hold(ran):
    "While those commands ran, every argument and result of the package was what its annotation says"
    assert not ran['wrong'], '\n'.join(ran['wrong'])
