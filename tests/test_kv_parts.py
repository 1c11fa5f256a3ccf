"Caches of models that see or listen: what the sweep scores is what the library computes with them"
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from optiq.backends.open import open_backend
from optiq.families.samples import batch_for
from optiq.formats import parse_format, quantize_dequantize
from optiq.kv.cache import MixedKVCache, mixed_caches, use_kv_config
from optiq.kv.config import kv_config, read_kv_config
from optiq.kv.layout import kv_layout, language
from optiq.kv.precondition import key_statistics
from optiq.kv.sweep import kv_sweep
from optiq.material.tiny import tiny
from optiq.models import Checkpoint
from optiq.plan import uniform

KINDS = dict(qwen3_vl='diagrams', qwen3_5='diagrams', qwen3_asr='bundled')
SMALL = dict( # what a kind needs, and no more
    qwen3_vl=dict(text_config=dict(num_hidden_layers=2), vision_config=dict(depth=2)),
    qwen3_5=dict(text_config=dict(num_hidden_layers=2, full_attention_interval=2), vision_config=dict(depth=1)),
    qwen3_asr=dict(thinker_config=dict(text_config=dict(num_hidden_layers=2), audio_config=dict(encoder_layers=1))))

@pytest.fixture(scope='module', params=KINDS)
def seen(request, tmp_path_factory):
    "A model, its backend, and one sample"
    c = Checkpoint(tiny(request.param, tmp_path_factory.mktemp('seen')/'m', SMALL[request.param], dtype='float32'))
    return c, open_backend(c), batch_for(c, KINDS[request.param], 1)

def answer(model, sample, caches): # logits at all positions
    x = {k: mx.array(np.asarray(v).astype(np.float32 if v.dtype.kind == 'f' else np.int32)) for k, v in sample.items() if k != 'scored'}
    if language(model) is model: return model(**x, cache=caches)
    ids, pixels, mask = (x.pop(k, None) for k in ('input_ids', 'pixel_values', 'attention_mask'))
    found = {k: v for k, v in model.get_input_embeddings(ids, pixels, mask=mask, **x).to_dict().items() if v is not None}
    return model.language_model(ids, inputs_embeds=found.pop('inputs_embeds'), cache=caches, **x | found).logits

def test_what_is_scored_is_what_the_cache_does(seen):
    c, b, (sample,) = seen
    layout, f = kv_layout(c, 64), parse_format('3g64')
    blocks = {u.path: u.block for u in layout.units}
    assert blocks and min(blocks.values()) >= list(c.blocks.values())[0] # the towers' blocks come first
    model = c.load()
    caches = mixed_caches(model, read_kv_config(kv_config(uniform(layout, f), layout), model))
    at = np.flatnonzero(sample['scored'][0])
    z = np.array(answer(model, sample, caches).astype(mx.float32))[:, at]
    simulated = b.numpy(b.logits(sample, {p: partial(quantize_dequantize, fmt=f) for p in blocks}))
    plain = b.numpy(b.logits(sample))
    assert abs(z-simulated).max() < 1e-3 < 1e-2 < abs(z-plain).max()
    size = sum(a.nbytes for cache in caches if isinstance(cache, MixedKVCache) for a in (*cache.keys, *cache.values))
    assert size == sum(u.nbytes(f) for u in kv_layout(c, 256).units) # a step of 256 tokens

def test_pictures_and_clips_are_in_the_sweep(seen):
    c, b, samples = seen
    sweep = kv_sweep(b, samples, ['2g64'], context=64, progress=False)
    assert len(sweep.values) == len(kv_layout(c).units) and all(v > 0 for v in sweep.values.values())
    found = key_statistics(b, samples)
    assert found.keys() == {u.path for u in kv_layout(c).units}

def test_mlx_vlm_generates_with_the_cache(seen, tmp_path):
    c, *_ = seen
    if c.model_type != 'vlm': pytest.skip('a model that sees')
    from mlx_vlm import apply_chat_template, generate
    from optiq.families.vision import load_processor
    from optiq.material.diagrams import diagrams
    model, p, layout = c.load(), load_processor(c), kv_layout(c)
    diagrams(1)[0][0].draw().save(tmp_path/'p.png')
    text = apply_chat_template(p, c.config, 'What?', num_images=1)
    def run(**more): return generate(model, p, text, image=[str(tmp_path/'p.png')], max_tokens=6, temperature=0., **more).text
    config, made = kv_config(uniform(layout, 4), layout), []
    want = run(prompt_cache=mixed_caches(model, read_kv_config(config, model)))
    make = use_kv_config(model, config).language_model.make_cache
    model.language_model.make_cache = lambda: made.append(make()) or made[-1]
    assert run() == want and any(isinstance(x, MixedKVCache) and x.offset for x in made[0])

def test_qwen3_asr_transcribes_with_the_cache(seen):
    c, *_ = seen
    if c.model_type != 'audio': pytest.skip('a model that listens')
    from optiq.families.audio import load_speech, transcribe
    model, layout, made = load_speech(c), kv_layout(c), []
    use_kv_config(model, kv_config(uniform(layout, 4), layout))
    inner = language(model)
    make = inner.make_cache
    inner.make_cache = lambda: made.append(make()) or made[-1]
    transcribe(model, np.random.default_rng(0).standard_normal(8000).astype(np.float32), 4)
    assert made and made[0][0].offset > 0
