"Whisper and Qwen3-ASR are given transcripts and sound as mlx-audio and transformers give them"
import json
import subprocess
import sys
import numpy as np
import pytest

pytest.importorskip('mlx_audio')
import mlx.core as mx
from optiq.audio import load_speech, qwen3_asr_sample, speech_samples, transcribe, whisper_sample
from optiq.speech import RATE, Clip, clips
from optiq.tiny import tiny

@pytest.fixture(scope='module')
def asr(tmp_path_factory): return load_speech(tiny('qwen3_asr', tmp_path_factory.mktemp('asr')/'m', dtype='float32'))

@pytest.fixture(scope='module')
def whisper(shared):
    folder = shared.resolve().parent/'models'/'whisper'
    if not folder.is_dir(): pytest.skip('needs Whisper tiny.en beside the shared folder')
    return folder

def test_qwen3_asr_predicts_the_transcript_where_it_is_scored(asr):
    heard = clips('bundled', n=2)
    for clip, s in zip(heard, speech_samples(asr, heard)):
        ids, scored = s['input_ids'][0], s['scored'][0].astype(bool)
        assert asr._tokenizer.decode(ids[1:][scored[:-1]]) == clip.text and scored[-1]
        z = asr(**{k: mx.array(v) for k, v in s.items() if k != 'scored'})
        assert z.shape == (1, len(ids), 512) and bool(mx.isfinite(z).all())
        sound = (ids == asr.config.audio_token_id).sum()
        assert sound == asr.get_audio_features(mx.array(s['input_features']), mx.array(s['feature_attention_mask'])).shape[0]

def test_sound_reaches_the_logits(asr):
    a, b = clips('bundled', n=2)
    x, y = (qwen3_asr_sample(asr, Clip('c', a.text, audio[:60000])) for audio in (a.audio, b.audio))
    run = lambda s: np.array(asr(**{k: mx.array(v) for k, v in s.items() if k != 'scored'}))
    assert np.abs(run(x)-run(y)).max() > 1e-3

def test_greedy_and_bounded(asr):
    clip, = clips('bundled', n=1)
    assert transcribe(asr, clip.audio, 6) == transcribe(asr, clip.audio, 6)
    assert len(asr._tokenizer.encode(transcribe(asr, clip.audio, 6))) <= 40

def test_code_in_a_checkpoint_is_refused(tmp_path):
    folder = tiny('qwen3_asr', tmp_path)
    file = folder/'tokenizer_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(auto_map=dict(AutoTokenizer=['evil.Tokenizer', None]))))
    with pytest.raises(ValueError, match='auto_map') as e: load_speech(folder)
    assert '\n' not in str(e.value)

def test_other_families_are_named():
    class Model: pass
    Model.__module__ = 'mlx_audio.stt.models.parakeet.parakeet'
    with pytest.raises(ValueError, match='parakeet.*whisper, qwen3_asr'): speech_samples(Model(), [])

ONE = dict(thinker_config=dict(text_config=dict(num_hidden_layers=1), audio_config=dict(encoder_layers=1)))

def optiq(*args):
    from click.testing import CliRunner
    from optiq.cli import main
    return CliRunner().invoke(main, [str(a) for a in args])

def test_the_whole_road(tmp_path):
    "optiq convert and optiq eval --task wer on Qwen3-ASR; a process without optiq opens what was written"
    model, out = tiny('qwen3_asr', tmp_path/'m', shape=ONE), tmp_path/'out'
    r = optiq('convert', model, '--model-type', 'audio', '--target-bpw', 5, '--n-calibration', 1, '--n-samples', 1, '--no-verify',
              '--skip-baselines', '-o', out, '--json')
    figures = json.loads(r.stdout.splitlines()[-1])
    assert r.exit_code == 0 and 0 < figures['kl'] < 1 and figures['nominal_bpw'] <= 5
    code = f"""import sys, numpy as np, mlx.core as mx
from mlx_audio.stt import load
model = load({str(out)!r})
print(type(model.model.embed_tokens).__name__, type(model.audio_tower.layers[0].fc1).__name__, 'optiq' in sys.modules)
model.generate(mx.array(np.sin(np.arange(16000, dtype=np.float32)/5)), max_tokens=3, temperature=0.)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ['QuantizedEmbedding', 'Linear', 'False'], done.stderr
    r = optiq('eval', out, '--task', 'wer', '--baseline', model, '--evaluation', 'bundled', '--n-samples', 1, '-o', tmp_path/'a.jsonl', '--json')
    found = json.loads(r.stdout.splitlines()[-1])
    assert r.exit_code == 0 and found['metric'] == 'wer' and found['n'] == 1 and found['baseline']['value'] >= 0
    assert set(found) >= {'task', 'metric', 'value', 'low', 'high', 'n', 'baseline', 'p_value'}
    assert len((tmp_path/'a.jsonl').read_text().splitlines()) == 2

@pytest.mark.parametrize('what, word', [('corrupt', 'no sound'), ('silent', 'silent'), ('alone', 'no transcript')])
def test_bad_speech_is_one_line(tmp_path, what, word):
    soundfile = pytest.importorskip('soundfile')
    model, folder = tiny('qwen3_asr', tmp_path/'m', shape=ONE), tmp_path/'speech'
    folder.mkdir()
    if what == 'corrupt': (folder/'a.wav').write_bytes(b'RIFF and nothing else')
    else: soundfile.write(folder/'a.wav', np.zeros(800)+(what == 'alone')*np.sin(np.arange(800)), RATE)
    if what != 'alone': (folder/'a.txt').write_text('a word')
    for r in (optiq('eval', model, '--task', 'wer', '--evaluation', folder),
              optiq('convert', model, '--calibration', folder, '--evaluation', 'bundled', '--n-calibration', 1, '-o', tmp_path/'o')):
        assert r.exit_code == 1 and word in r.output and r.output.startswith('error: ') and r.output.count('\n') == 1
    assert not (tmp_path/'o').exists()

def test_a_text_model_is_no_speech_model(tmp_path):
    r = optiq('convert', 'demo', '--model-type', 'audio', '-o', tmp_path/'o')
    assert r.exit_code == 1 and 'audio' in r.output and r.output.count('\n') == 1 and not (tmp_path/'o').exists()
    r = optiq('eval', 'demo', '--task', 'wer', '--evaluation', 'bundled', '--n-samples', '1')
    assert r.exit_code == 1 and r.output.count('\n') == 1, r.output

def test_whisper_sample(whisper, shared):
    "Features and logits are those of transformers, and greedy transcripts are the same to the letter"
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    model = load_speech(whisper)
    clip = next(c for c in clips(shared/'data'/'speech', 'all') if c.name == 'fleurs-en-003.ogg')
    s = whisper_sample(model, clip)
    tokenizer, ids = model._processor.tokenizer, s['tokens'][0]
    assert tokenizer.decode(ids[1:][s['scored'][0, :-1].astype(bool)]) == ' '+clip.text
    reference = transformers.WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    features = transformers.WhisperFeatureExtractor.from_pretrained(whisper)(clip.audio, sampling_rate=RATE, return_tensors='pt').input_features
    np.testing.assert_allclose(s['mel'][0], features[0].numpy().T, atol=1e-4)
    with torch.no_grad():
        z = reference(input_features=features, decoder_input_ids=torch.tensor(s['tokens'])).logits.numpy()
        written = tokenizer.decode(reference.generate(features, max_new_tokens=60)[0], skip_special_tokens=True).strip()
    np.testing.assert_allclose(np.array(model(mx.array(s['mel']), mx.array(s['tokens']))), z, atol=5e-3)
    assert transcribe(model, clip.audio) == written and 'cabbage juice' in written
    with pytest.raises(ValueError, match='31 s long.*cut it'): whisper_sample(model, Clip('long', 'x', np.ones(31*RATE, np.float32)))
