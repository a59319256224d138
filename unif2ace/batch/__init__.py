"""Files in, files out: a table of prompts to pictures, a table of questions to answers, on one machine or many.

table.py      rows of .txt, .jsonl or .parquet, read as a stream, numbered the same for everybody
record.py     what is done: append-only parts, one per process; a run that stopped goes on from them
output.py     the finished result, in the order of the table: a manifest beside pictures, a Parquet or a JSON Lines file
faces.py      what the rows of prompts mean, and how they are drawn;   answers.py  the same for questions
ray.py        the same work on the machines of a Ray cluster
command.py    `unif2ace generate --prompts` and `unif2ace ask --questions`
"""
