"""One run of Markovian RSA on an endpoint with a journal, as a process that a test can kill.

python -m tests.ttc.rsa_process URL JOURNAL SETTINGS_JSON      prints the result as JSON
"""

from __future__ import annotations

import asyncio
import json
import sys

from openzaya.ttc.config import RSAConfig
from openzaya.ttc.endpoint import EndpointCompleter
from openzaya.ttc.journal import Journal
from openzaya.ttc.rsa import markovian_rsa

QUESTION = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "What is the value of 检查?"}]


async def run(url: str, path: str, settings: str) -> None:
    """Attempts are cheap here, and a call that hangs is given up soon."""
    completer = EndpointCompleter(url, timeout_s=0.5, retry_wait_s=0.01, max_retries=15, concurrency=8)
    with Journal.open(path) as journal:
        try:
            config = RSAConfig(**json.loads(settings))
            result = await markovian_rsa(QUESTION, completer, config, journal=journal, run_key="run")
        finally:
            await completer.close()
    print(json.dumps(result.to_dict()))


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
