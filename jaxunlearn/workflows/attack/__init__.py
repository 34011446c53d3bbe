# SPDX-License-Identifier: Apache-2.0
"""The parts of jaxunlearn/workflows/attack/run.py: facts, what is asked, the attacks, the card.

| module | has |
| --- | --- |
| `facts` | questions with choices, from benchmarks, files or the capitals |
| `asking` | what a model knows of them, fact by fact |
| `units` | every attack as one piece of work with a result of its own |
| `card` | the robustness card that is made of the results |
"""
