package pool

import (
	"testing"
	"time"
)

func TestCalm(t *testing.T) {
	const q, p = 500 * time.Millisecond, 3 * time.Second
	for name, tc := range map[string]struct {
		claims []time.Duration // since the first
		at     time.Duration
		want   time.Duration
	}{
		"nobody has claimed":      {nil, 0, 0},
		"just now":                {[]time.Duration{0}, 0, q},
		"a moment ago":            {[]time.Duration{0}, q / 5, q * 4 / 5},
		"long ago":                {[]time.Duration{0}, q, 0},
		"the last counts":         {[]time.Duration{0, q / 2}, q / 2, q},
		"patience is limited":     {[]time.Duration{0, q - 1, 2*q - 2, 3*q - 3, 4*q - 4, 5*q - 5, p - q/5}, p - q/5, q / 5},
		"patience has ended":      {[]time.Duration{0, q - 1, 2*q - 2, 3*q - 3, 4*q - 4, 5*q - 5, p - q/5, p}, p, 0},
		"it begins anew":          {[]time.Duration{0, q - 1, 3 * q}, 3 * q, q},
		"a stream goes on and on": {[]time.Duration{0, q - 1, 2*q - 2, 3*q - 3, 4*q - 4, 5*q - 5, p - q/5, p, p + q/2}, p + q/2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			c := calm{quiet: q, patience: p}
			for _, at := range tc.claims {
				c.claimed(begin.Add(at))
			}
			if got := c.still(begin.Add(tc.at)); got != tc.want {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
}

// Nothing is started while a container may be starting, and what has begun stands
// still.
func TestRefillGivesWay(t *testing.T) {
	const quiet = 200 * time.Millisecond
	d := newDaemon(t)
	d.calm = calm{quiet: quiet, patience: time.Hour}
	d.run(t, Entry{VM: vmOf(1, 256), Size: 2})
	d.ready(t, 2)

	claim := func(id string) time.Time {
		p := d.pod(t, id, vmOf(1, 128))
		at := time.Now()
		c, err := Claim(t.Context(), d.dir, p.claim, p.Handover)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		(<-d.taken).Close()
		return at
	}
	yields := make(chan bool, 8)
	d.hold.Store(&yields)
	first := claim("one")
	if begun := <-d.begun; begun.Sub(first) < quiet {
		t.Errorf("the next one was started %v after the claim, want %v at least", begun.Sub(first), quiet)
	}
	second := claim("two")
	if !<-yields {
		t.Error("it was told to go on before it stood still")
	}
	if <-yields {
		t.Error("it was told twice to stand still")
	}
	if now := time.Now(); now.Sub(second) < quiet {
		t.Errorf("it went on %v after the claim, want %v at least", now.Sub(second), quiet)
	}
	d.hold.Store(nil)
	d.ready(t, 2)
}
