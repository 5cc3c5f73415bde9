package container

import "errors"

// cleanup is a stack of what has to be undone. A step registers its undo right
// when it has happened.
type cleanup struct{ steps []func() error }

func (c *cleanup) add(f func() error) { c.steps = append(c.steps, f) }

// run undoes everything, last step first. A step that fails stays registered,
// and so do those below it: run can be called again.
func (c *cleanup) run() error {
	for len(c.steps) > 0 {
		last := len(c.steps) - 1
		if err := c.steps[last](); err != nil {
			return err
		}
		c.steps = c.steps[:last]
	}
	return nil
}

// closers closes descriptors; the zero value is ready.
type closers []interface{ Close() error }

func (c *closers) add(f interface{ Close() error }) { *c = append(*c, f) }

func (c *closers) close() error {
	var errs []error
	for _, f := range *c {
		errs = append(errs, f.Close())
	}
	*c = nil
	return errors.Join(errs...)
}
