"""Let espeak-ng read sentences of a text: speech to calibrate on where too little was recorded, and to score nothing on.

    python bench/speak.py TEXT -n 8 -o FOLDER

Each clip is as many sentences as fit into `--seconds`, in one voice, with its transcript beside it.
"""
import argparse
import re
import subprocess
from pathlib import Path

import numpy as np
import soundfile

from optiq.calibration import passages
from optiq.material.speech import RATE, _read_sound

VOICES = 'en-us', 'en-gb', 'en-us+f3', 'en-gb-scotland', 'en-us+m3', 'en-gb+f2', 'en-gb-x-rp', 'en-us+f5', 'en-us+m7', 'en-gb+m1'

def sentences(text: str) -> list[str]:
    "Whole sentences of plain words, free of the marks of a tokenized text"
    for old, new in ((r' @(\W)@ ', r'\1'), (r' ([,.;:?!)\'])', r'\1'), (r'\( ', '('), (r'\s+', ' ')): text = re.sub(old, new, text)
    found = re.findall(r"(?<=[.?!] )[A-Z][A-Za-z0-9,;'\- ]{40,160}[.?!](?= )", text)
    return list(dict.fromkeys(s for s in found if s.count(',') < 4))

def say(text: str, voice: str, pace: int) -> np.ndarray:
    "Sound of `RATE`"
    done = subprocess.run(['espeak-ng', '-v', voice, '-s', str(pace), '--stdout', text], capture_output=True, check=True)
    return _read_sound(done.stdout, f'espeak-ng {voice}')

def speak(source: str, n: int, folder: Path, seconds: float, seed: int = 0):
    rng, clips = np.random.default_rng(seed), 0
    todo = sentences(' '.join(passages(source, 'train')))
    todo = iter([todo[i] for i in rng.permutation(len(todo))])
    folder.mkdir(parents=True, exist_ok=True)
    while clips < n:
        voice, pace, parts, words, pause = VOICES[clips % len(VOICES)], int(rng.integers(140, 200)), [], [], np.zeros(RATE//3, np.float32)
        for s in todo:
            sound = say(s, voice, pace)
            if words and sum(map(len, parts))+len(sound) > seconds*RATE: break
            parts, words = parts+[sound, pause], words+[s]
        if not words: raise ValueError(f'{source} has too few sentences for {n} clips; ask for fewer')
        name = folder/f'{clips:03d}-{voice.replace("+", "-")}'
        noise = rng.normal(0, 10**rng.uniform(-4, -2.5), sum(map(len, parts))).astype(np.float32)
        soundfile.write(name.with_suffix('.flac'), np.concatenate(parts)+noise, RATE)
        name.with_suffix('.txt').write_text(' '.join(words)+'\n')
        clips += 1

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('text', help='a text file, or a name that optiq knows')
    p.add_argument('-n', type=int, default=8, help='clips')
    p.add_argument('-o', '--output', required=True)
    p.add_argument('--seconds', type=float, default=28, help='of a clip, at most')
    args = p.parse_args()
    speak(args.text, args.n, Path(args.output), args.seconds)

if __name__ == '__main__': main()
