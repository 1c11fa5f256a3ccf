"A prompt begins once, and ends where the answer begins, whatever a tokenizer puts around a text"
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from optiq.backends.open import open_backend
from optiq.calibration import before, encode, prompt_ids
from optiq.evals.needle import _pairs_of
from optiq.evals.tasks import answers, compose
from optiq.families.samples import batch_for
from optiq.material.tiny import tiny
from optiq.models import Checkpoint

BOS, EOS = '<|endoftext|>', '<|im_end|>'
AROUND = dict(none='$A', bos=f'{BOS} $A', eos=f'$A {EOS}', both=f'{BOS} $A {EOS}')

def made(folder, architecture: str, around: str, shape=None) -> Checkpoint:
    "A checkpoint whose tokenizer puts special tokens around a text, and whose template begins with the first of them, too"
    tiny(architecture, folder, shape)
    t = Tokenizer.from_file(str(folder/'tokenizer.json'))
    if around != 'none': t.post_processor = processors.TemplateProcessing(
        single=AROUND[around], special_tokens=[(x, t.token_to_id(x)) for x in (BOS, EOS)])
    t.save(str(folder/'tokenizer.json'))
    c = json.loads((folder/'tokenizer_config.json').read_text())
    if 'chat_template' in c: c['chat_template'] = '{{ bos_token }}'+c['chat_template']
    (folder/'tokenizer_config.json').write_text(json.dumps(c | dict(bos_token=BOS)))
    return Checkpoint(folder)

@pytest.mark.parametrize('around', AROUND)
def test_texts_that_are_gone_on_with(tmp_path, monkeypatch, around):
    b, seen = open_backend(made(tmp_path/'m', 'llama', around, dict(num_hidden_layers=1))), []
    t, first = b.checkpoint.tokenizer, [0]*(around in ('bos', 'both'))
    def write(self, prompts, *args):
        seen.extend(prompts)
        return [[5] for _ in prompts]
    monkeypatch.setattr(type(b), 'write', write)
    compose(b, ['one two'])
    answers(b, [dict(prompt='one two', answer='three')])
    assert seen == [first+encode(t, 'one two')]*2 and before(t) == first
    assert prompt_ids(t, f'{BOS}one') == [0]+encode(t, 'one') # a template wrote it
    assert _pairs_of(t, [dict(prompt='one two', answer='three')])[0][0] == first+encode(t, 'one two')

@pytest.mark.parametrize('around', AROUND)
def test_pictures(tmp_path, monkeypatch, around):
    pytest.importorskip('mlx_vlm')
    import mlx_vlm
    from optiq.evals.ai2d import ai2d
    c = made(tmp_path/'m', 'qwen3_vl', around, dict(text_config=dict(num_hidden_layers=1)))
    s = batch_for(c, 'diagrams', 1)[0]
    ids, first = s['input_ids'][0].tolist(), int(np.flatnonzero(s['scored'])[0])
    assert ids[0] == 0 and ids[1] != 0 and ids[first] != 2
    assert s['attention_mask'].shape == s['scored'].shape == (1, len(ids))
    seen, generate = [], mlx_vlm.generate
    def hear(*args, input_ids, **more):
        seen.append(np.array(input_ids)[0].tolist())
        return generate(*args, input_ids=input_ids, **more)
    monkeypatch.setattr(mlx_vlm, 'generate', hear)
    ai2d(c, 1, 'diagrams', new_tokens=2)
    assert seen[0][:2] == ids[:2] and seen[0][-3:] == ids[first-2:first+1] # what the letters are scored after

@pytest.mark.parametrize('around', AROUND)
def test_speech(tmp_path, around):
    pytest.importorskip('mlx_audio')
    small = dict(text_config=dict(num_hidden_layers=1), audio_config=dict(encoder_layers=1))
    c = made(tmp_path/'m', 'qwen3_asr', around, dict(thinker_config=small))
    s = batch_for(c, 'bundled', 1)[0]
    ids, first = s['input_ids'][0].tolist(), int(np.flatnonzero(s['scored'])[0])
    assert (ids[0] == 0) == (around in ('bos', 'both')) and ids[1] != 0 and ids[first] != 2
