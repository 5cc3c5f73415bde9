package supervisor

import (
	"context"
	"sync"
	"time"

	"github.com/golang/glog"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// maxEvents is how many events are kept for those who ask later.
const maxEvents = 256

// eventLog keeps the last events of a pod and wakes those who wait for one.
type eventLog struct {
	mu       sync.Mutex // guards all below
	sequence uint64     // of the last event
	last     []*supervisorv1.Event
	more     chan struct{} // closed and replaced by add
	watched  map[*container]bool
}

func newEventLog() *eventLog {
	return &eventLog{more: make(chan struct{}), watched: make(map[*container]bool)}
}

// add appends an event and gives it its number and time.
func (l *eventLog) add(e *supervisorv1.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sequence++
	e.Sequence, e.TimeUnixNano = l.sequence, time.Now().UnixNano()
	if len(l.last) == maxEvents {
		l.last = append(l.last[:0:0], l.last[1:]...)
	}
	l.last = append(l.last, e)
	close(l.more)
	l.more = make(chan struct{})
}

// since returns the events after a number, of one container or of all, and a
// channel that is closed when there is another.
func (l *eventLog) since(id string, after uint64) ([]*supervisorv1.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var es []*supervisorv1.Event
	for _, e := range l.last {
		if e.Sequence > after && (id == "" || e.Id == id) {
			es = append(es, e)
		}
	}
	return es, l.more
}

// note adds an event of a container that needs no more words than its kind.
func (s *Supervisor) note(c *container, kind supervisorv1.Event_Kind) {
	s.events.add(&supervisorv1.Event{Id: c.id, Kind: kind})
}

// watchMemory tells of processes that the guest's kernel kills for want of
// memory. It costs the guest a thread per container, so it begins when somebody
// asks for events; what happened before is told then.
func (s *Supervisor) watchMemory(c *container) {
	s.events.mu.Lock()
	known := s.events.watched[c]
	s.events.watched[c] = true
	s.events.mu.Unlock()
	if known {
		return
	}
	s.wg.Go(func() {
		var seen uint64
		for {
			resp, err := s.client().WaitOOM(s.life, &agentv1.WaitOOMRequest{ContainerId: c.id, After: seen})
			if err != nil || resp.Count <= seen {
				glog.V(1).Infof("container %s: no more news of its memory: %v", c.id, err)
				return
			}
			seen = resp.Count
			s.events.add(&supervisorv1.Event{Id: c.id, Kind: supervisorv1.Event_KIND_OOM, OomKills: seen})
		}
	})
}

// Events implements the API.
func (v *service) Events(ctx context.Context, req *supervisorv1.EventsRequest) (*supervisorv1.EventsResponse, error) {
	s := v.s
	for {
		s.mu.Lock()
		var watch []*container
		known := req.Id == ""
		for id, c := range s.containers {
			if (req.Id == "" || req.Id == id) && s.cause == nil {
				known = true
				if c.state != creating && c.state != stopped {
					watch = append(watch, c)
				}
			}
		}
		s.mu.Unlock()
		for _, c := range watch {
			s.watchMemory(c)
		}
		es, more := s.events.since(req.Id, req.After)
		if len(es) > 0 {
			return &supervisorv1.EventsResponse{Events: es}, nil
		}
		if !known {
			return nil, errNoContainer
		}
		select {
		case <-more:
		case <-s.ending:
			// The last event is that of the end; finish adds it before the
			// connections are closed.
			select {
			case <-more:
			case <-s.gone:
			case <-ctx.Done():
				return answer[supervisorv1.EventsResponse](nil, context.Cause(ctx))
			}
			es, _ := s.events.since(req.Id, req.After)
			if len(es) > 0 {
				return &supervisorv1.EventsResponse{Events: es}, nil
			}
			return nil, errNoContainer
		case <-ctx.Done():
			return answer[supervisorv1.EventsResponse](nil, context.Cause(ctx))
		}
	}
}
