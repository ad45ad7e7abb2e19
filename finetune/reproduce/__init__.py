"""`reproduce`: trains and scores what the papers claim, row by row, and writes RESULTS.md.

study -> steps -> queue -> claims -> results
"""
