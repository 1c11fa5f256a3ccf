"What a model caches: layers that are left alone, units, and bytes"
import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from optiq.formats import AS_IS
from optiq.kv.cache import use_kv_config
from optiq.kv.layout import kv_layers, kv_layout, own_caches
from optiq.material.tiny import tiny
from optiq.models import Checkpoint

def test_layers_that_are_left_alone(tmp_path):
    found = {n: kv_layers(Checkpoint(tiny(n, tmp_path/n), model_type='llm').load()) for n in ('gemma3', 'qwen3_5', 'qwen3_moe')}
    assert not any(l.left for l in found['gemma3']) and [l.window for l in found['gemma3']] == [16, None]*2
    assert found['gemma3'][0].nbytes(1000) == found['gemma3'][0].nbytes(16)
    assert [l.left for l in found['qwen3_5'][:3]] == ['recurrent state']*3 and found['qwen3_5'][3].block == 3
    assert all(l.constant > 0 and l.nbytes(1) == l.nbytes(9999) for l in found['qwen3_5'][:3])
    assert not any(l.left for l in found['qwen3_moe'])

@pytest.mark.parametrize('attention, why', [
    (lambda sdpa: lambda q, k, v, **o: sdpa(q, k+0, v+0, **o), 'attention does not read what it holds (MLA)'),
    (lambda sdpa: lambda q, k, v, **o: sdpa(sdpa(q, k, v, **o), k, v, **o), 'later layers read it too')])
def test_mla_and_shared_caches_are_recognised(folder, monkeypatch, attention, why):
    import mlx_lm.models.qwen3 as qwen3
    model = Checkpoint(folder).load()
    monkeypatch.setattr(qwen3, 'scaled_dot_product_attention', attention(qwen3.scaled_dot_product_attention))
    assert {l.left for l in kv_layers(model)} == {why}
    with pytest.raises(ValueError, match='nothing of this cache can be quantized.*3 layers'): kv_layout(model)

def test_latent_attention_is_named_with_its_bytes():
    from mlx_lm.models.deepseek_v3 import Model, ModelArgs
    model = Model(ModelArgs(vocab_size=512, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=32, qk_rope_head_dim=32, v_head_dim=32, qk_nope_head_dim=32,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1))
    latent = 2*1000*(64+32)*4 # a latent and a rope key a token and layer, in float32
    assert sum(l.nbytes(1000) for l in kv_layers(model)) == latent
    with pytest.raises(ValueError, match=rf'MLA\) \(2 layers\); it holds {latent:,} bytes at 1,000 tokens'): kv_layout(model, 1000)

def test_several_caches_in_one_entry_are_all_counted(folder, monkeypatch):
    from mlx_lm.models.cache import ArraysCache, CacheList
    import mlx_lm.models.qwen3 as qwen3
    model = Checkpoint(folder).load()
    plain = kv_layers(model)[0]
    class Both(CacheList):
        offset = 0
        def make_mask(self, N, **options): return 'causal'
        def update_and_fetch(self, k, v):
            self.caches[0][0] = mx.zeros((1, 10), mx.bfloat16)
            return [c.update_and_fetch(k, v) for c in self.caches[1:]][0]
    monkeypatch.setattr(qwen3.Model, 'make_cache', lambda self: [Both(ArraysCache(1), KVCache(), KVCache()) for _ in self.layers], raising=False)
    found = kv_layers(model)[0]
    assert 'not a plain cache' in found.left and found.nbytes(100) == 2*plain.nbytes(100)+20

def test_layout_counts_only_what_can_be_quantized(tmp_path):
    c = Checkpoint(tiny('qwen3_5', tmp_path/'q'), model_type='llm')
    layout = kv_layout(c, 1000)
    assert [u.path for u in layout.units] == ['cache.3.keys', 'cache.3.values'] and list(layout.left) == [0, 1, 2]
    assert layout.other_bytes > 0 and layout.nbytes == layout.other_bytes+sum(u.nbytes(AS_IS) for u in layout.units)
    with pytest.raises(ValueError, match='context. must be at least 1 token, not 0'): kv_layout(c, 0)

def test_what_was_installed_does_not_hide_the_models_own_caches(served):
    model, config, *_ = served
    use_kv_config(use_kv_config(model, config), config)
    assert {type(c).__name__ for c in make_prompt_cache(model)} == {'MixedKVCache'}
    assert {type(c) for c in own_caches(model)} == {KVCache} and not any(l.left for l in kv_layers(model))
    del model.make_cache
    assert {type(c) for c in make_prompt_cache(model)} == {KVCache}
