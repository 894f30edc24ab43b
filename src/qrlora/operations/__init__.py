"""Register, sign, approve and use adapters in a company. Needs no network.

provenance/  keys, signatures (DSSE), certificates, C2PA manifests, perceptual hashes, the audit log's hash chain
registry/    immutable artifacts by digest, edges, names, aliases, audit log; SQLite or PostgreSQL, a folder or fsspec
policy/      licences of compositions, rules, approvals
catalog/     every product in every style, on Ray
pilot/       the staged way from one picture to the line, with a gate after each stage
"""
