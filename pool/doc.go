// Package pool is the factory that keeps VMs ready: `runv manage factory`.
//
// The factory (Serve) is a daemon that keeps standbys: supervisors whose VM runs
// already and whose guest waits for an identity. Whoever creates a pod asks for
// one (Claim) and gives it what a supervisor inherits from its creator, as
// descriptors; from then on the standby is that pod's supervisor and the factory
// has nothing to do with it any more. Standby is the standby's side of it.
//
//	creator ──Claim, descriptors──▶ factory ──the same, and the connection──▶ standby
//	   ▲                                                                        │
//	   └───────────────────────── ClaimAnswer: pid ─────────────────────────────┘
//	creator ──TAKEN──▶ standby
//
// Nobody waits for the factory: a claim is answered at once or not at all, and a
// creator without an answer starts a supervisor as if there were no factory. Until
// it has said TAKEN the standby has done nothing for it.
//
// docs/factory.md has the picture, and what happens if somebody dies. Of runv only
// the API, state and the policy's language may be imported here: what a VM is and
// how a standby gets one is the supervisor's business.
package pool
