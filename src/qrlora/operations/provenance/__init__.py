"""Proofs that need no database: digests, the audit log's chain, signatures, C2PA manifests, perceptual hashes."""
