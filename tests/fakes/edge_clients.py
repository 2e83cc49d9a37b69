"""`python -m tests.fakes.edge_clients probe URL COUNT RATE` and `... clips URL EVERY_S COUNT`: clients as processes.

The first asks for classifications at a steady rate and prints its latencies (JSON, milliseconds); the second uploads
20 MB at a time, whatever the answers say.
"""

import asyncio
import http.client
import json
import sys
import time
from collections import Counter
from urllib.parse import urlparse

import aiohttp
import numpy as np

CLIP_BYTES = 20_000_000
WARM_UP = 50


async def probe(url: str, count: int, rate: float) -> dict[str, float]:
    """Latencies of `count` classifications at `rate` per second, open loop."""
    took_ms: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> None:
            sent_s = time.perf_counter()
            body = b"tidegate-label:1\n" + bytes(4000)
            async with session.post(f"{url}/v1/null", data=body, headers={"content-type": "image/jpeg"}) as response:
                await response.read()
                assert response.status == 200
            took_ms.append((time.perf_counter() - sent_s) * 1e3)

        started_s, tasks = time.perf_counter(), []
        for number in range(count):
            await asyncio.sleep(max(0.0, started_s + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)
    counted = np.array(took_ms[WARM_UP:])
    return {name: float(np.quantile(counted, q)) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}


def clips(url: str, every_s: float, count: int) -> dict[str, int]:
    """Statuses of so many uploads, one after the other."""
    where, statuses = urlparse(url), Counter[str]()
    body = bytes(CLIP_BYTES)
    for number in range(count):
        started_s = time.monotonic()
        connection = http.client.HTTPConnection(where.hostname or "", where.port)
        headers = {"content-type": "video/mp4", "x-edge-node": "abcd"[number % 4]}
        connection.request("POST", "/v1/tracking", body, headers)
        statuses[str(connection.getresponse().status)] += 1
        connection.close()
        time.sleep(max(0.0, started_s + every_s - time.monotonic()))
    return dict(statuses)


if __name__ == "__main__":
    what, url, *rest = sys.argv[1:]
    if what == "probe":
        print(json.dumps(asyncio.run(probe(url, int(rest[0]), float(rest[1])))))
    else:
        print(json.dumps(clips(url, float(rest[0]), int(rest[1]))))
