"""A process for the tests that is timed: keeps a line in task["log"] for each of its calls, with begin and end."""

import json
import sys
import time

task = json.loads(sys.argv[1])
if task.get("fails"):
    raise SystemExit("no such engine")
print(json.dumps({"detections": task["detections"]}), flush=True)
for _ in sys.stdin:
    begin = time.monotonic()
    time.sleep(0.01)
    with open(task["log"], "a") as log:
        log.write(json.dumps([task["name"], begin, time.monotonic()]) + "\n")
    print(json.dumps({"seconds": task["seconds"]}), flush=True)
