package containerdshim

import (
	"context"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

const (
	// eventQueue is how many events may wait for a containerd that is away. The
	// library's publisher tries each several times.
	eventQueue = 1024
	// eventFlush bounds how long the end of the shim waits for those.
	eventFlush = 2 * time.Second
)

// publisher sends events one after the other, in the order of send.
type publisher struct {
	queue chan queued
	done  chan struct{}

	mu     sync.RWMutex // held for reading by senders
	closed bool
}

type queued struct {
	topic string
	event events.Event
}

func newPublisher(ctx context.Context, to events.Publisher) *publisher {
	p := &publisher{queue: make(chan queued, eventQueue), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for q := range p.queue {
			if err := to.Publish(ctx, q.topic, q.event); err != nil {
				log.G(ctx).WithError(err).Errorf("publish event %s", q.topic)
			}
		}
	}()
	return p
}

// send does nothing after close.
func (p *publisher) send(e events.Event) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if topic := topicOf(e); topic != "" && !p.closed {
		p.queue <- queued{topic, e}
	}
}

// close waits a moment for what is queued. It is called once.
func (p *publisher) close() {
	p.mu.Lock()
	p.closed = true
	close(p.queue)
	p.mu.Unlock()
	t := time.NewTimer(eventFlush)
	defer t.Stop()
	select {
	case <-p.done:
	case <-t.C:
	}
}

func topicOf(e events.Event) string {
	switch e.(type) {
	case *eventsapi.TaskCreate:
		return runtime.TaskCreateEventTopic
	case *eventsapi.TaskStart:
		return runtime.TaskStartEventTopic
	case *eventsapi.TaskOOM:
		return runtime.TaskOOMEventTopic
	case *eventsapi.TaskExit:
		return runtime.TaskExitEventTopic
	case *eventsapi.TaskDelete:
		return runtime.TaskDeleteEventTopic
	case *eventsapi.TaskExecAdded:
		return runtime.TaskExecAddedEventTopic
	case *eventsapi.TaskExecStarted:
		return runtime.TaskExecStartedEventTopic
	case *eventsapi.TaskPaused:
		return runtime.TaskPausedEventTopic
	case *eventsapi.TaskResumed:
		return runtime.TaskResumedEventTopic
	}
	return ""
}

// follow publishes what the pod's supervisor tells of: what happens in the guest
// by itself, and what others than containerd have asked for. It returns when
// the pod has ended.
func (s *service) follow(p *pod) {
	var after uint64
	for {
		resp, err := p.sup.Events(s.ctx, &supervisorv1.EventsRequest{After: after})
		if err != nil {
			return
		}
		for _, e := range resp.Events {
			after = max(after, e.Sequence)
			s.mu.Lock()
			t := s.tasks[e.Id]
			s.mu.Unlock()
			if t == nil {
				continue
			}
			switch e.Kind {
			case supervisorv1.Event_KIND_OOM:
				t.oom(s)
			case supervisorv1.Event_KIND_PAUSE:
				s.events.send(&eventsapi.TaskPaused{ContainerID: e.Id})
			case supervisorv1.Event_KIND_RESUME:
				s.events.send(&eventsapi.TaskResumed{ContainerID: e.Id})
			default: // told where it is done
			}
		}
	}
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
