package pool

import (
	"context"
	"time"

	"github.com/golang/glog"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

const (
	// quietTime is how long nobody must have claimed anything for a standby to be
	// made: so long the start of a container has the machine to itself.
	quietTime = 500 * time.Millisecond
	// patience is how long claims that come one after the other keep it from being
	// made. After that it goes on, at low priority, as long as they come.
	patience = time.Second
)

// calm is when standbys may be made, by when claims came. factory.mu guards it.
type calm struct {
	quiet, patience time.Duration
	// began is the first claim of those that came with less than quiet between
	// them, last is the latest.
	began, last time.Time
}

func (c *calm) claimed(now time.Time) {
	if now.Sub(c.last) >= c.quiet {
		c.began = now
	}
	c.last = now
}

// still is how long no standby is to be made from now on; 0: it may be.
func (c *calm) still(now time.Time) time.Duration {
	rest := c.quiet - now.Sub(c.last)
	return max(0, min(rest, c.patience-now.Sub(c.began)))
}

// disturbed notes that a container is being started.
func (f *factory) disturbed() {
	f.mu.Lock()
	f.calm.claimed(time.Now())
	f.mu.Unlock()
	select {
	case f.claims <- struct{}{}:
	default:
	}
}

// still is how long no standby is to be made from now on; 0: it may be.
func (f *factory) still() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calm.still(time.Now())
}

// attend waits until a standby is ready or has ended, and lets it stand still
// while containers are started.
func (f *factory) attend(ctx context.Context, s *standby) {
	stands := false
	for {
		rest := f.still()
		if stands != (rest > 0) {
			stands = rest > 0
			// One that has gone needs not be told.
			if err := send(s.conn, &supervisorv1.FactoryRequest{Ask: &supervisorv1.FactoryRequest_Yield{Yield: &supervisorv1.StandbyYield{Still: stands}}}); err != nil {
				glog.V(1).Infof("factory: standby %d: %v", s.ref.Pid, err)
			}
		}
		var over <-chan time.Time
		var t *time.Timer
		if stands {
			t = time.NewTimer(rest)
			over = t.C
		}
		ended := false
		select {
		case <-s.settled:
			ended = true
		case <-ctx.Done():
			ended = true
		case <-f.claims:
		case <-over:
		}
		if t != nil {
			t.Stop()
		}
		if ended {
			return
		}
	}
}
