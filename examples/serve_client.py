"""A picture from `qrlora serve --adapters .`: python examples/serve_client.py http://127.0.0.1:8000 MODEL [STEPS]"""

import base64
import json
import sys
import urllib.request

url, model, *steps = sys.argv[1:]  # such as pico+subject:0.9+style
body = {"model": model, "prompt": "a photo of a red <c> in <s> style", **({"steps": int(steps[0])} if steps else {})}
request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
with urllib.request.urlopen(request) as answer, open("served.png", "wb") as file:
    file.write(base64.b64decode(json.load(answer)["data"][0]["b64_json"]))
