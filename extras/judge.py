"""UnifiedReward, a vision-language model that judges behind an OpenAI-compatible server.

    vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b
    python vgrpo.py --reward unified@http://localhost:8000
"""
import base64
import contextlib
import json
import math
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch

from rewards import UsageError, jpeg, one_line

SERVE = "`vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b`, then unified@http://localhost:8000"
QUESTION = (
    'This picture was generated from the caption "{}". Judge how well it matches and how good it '
    'looks.\nExplain briefly, then end with one line "Final Score: X", with X from 1 (bad) to 5 '
    '(perfect).')


def call(url, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


class Judge:
    def __init__(self, device, url=""):
        self.url = url.rstrip("/") + "/v1/"
        with one_line(UsageError, f"no judge at {url}; {SERVE}"):
            self.model = call(self.url + "models")["data"][0]["id"]

    def ask(self, image, prompt):
        picture = "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}},
                   {"type": "text", "text": QUESTION.format(prompt)}]
        message = {"role": "user", "content": content}
        body = {"model": self.model, "temperature": 0, "messages": [message]}
        for _ in range(3):
            with contextlib.suppress(Exception):            # no answer, or none with a score
                reply = call(self.url + "chat/completions", body)["choices"][0]["message"]
                text = reply["content"].lower()
                score = float(re.findall(r"final score[\s:*_`]*(\d+(?:\.\d+)?)", text)[-1])
                return score / 5 if 1 <= score <= 5 else math.nan   # a "10" is neither 1 nor 5
        return math.nan

    def __call__(self, images, prompts, metadata):
        with ThreadPoolExecutor(32) as pool:
            return torch.tensor(list(pool.map(self.ask, images, prompts)))
