package client

import "slices"

// undo is a list of steps that take back what has been done, the last first.
type undo struct{ steps []func() }

func (u *undo) add(f func()) { u.steps = append(u.steps, f) }

// run takes everything back.
func (u *undo) run() {
	for _, f := range slices.Backward(u.steps) {
		f()
	}
	u.steps = nil
}

// keep forgets the steps: what they would take back stays.
func (u *undo) keep() { u.steps = nil }
